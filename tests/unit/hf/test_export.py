"""Export: what transformers reads without our code computes and generates the same; other models are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm.checkpoint.hf import ExportOptions, build_model, export_hf, load_hf
from llm.checkpoint.hf import parity as parity_module
from llm.checkpoint.hf.parity import check_tokens
from llm.checkpoint.hf.shape import canonical, hf_config
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.data.tokenizer.simple import BytesTokenizer
from llm.generate import Engine, Sampling, load_model
from llm.models.config import ModelConfig

pytest.importorskip("transformers")

Saved = Callable[..., tuple[Any, Path]]
EXPORTED = [
    "llama",
    "llama-tied-biased",
    "llama-head-dim",
    "llama-linear",
    "llama-llama3",
    "llama-yarn",
    "qwen3",
    "qwen3-tied-biased",
    "qwen3-yarn",
]

ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
try:
    import llm
except ImportError:
    pass
else:
    sys.exit("this process can import the project")
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = torch.load(folder + "/../given.pt", weights_only=True)
    options = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        torch.save(model(given["tokens"]).logits, folder + "/../logits.pt")
        rows = [
            model.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p):].tolist()
            for p in given["prompts"]
        ]
    print(json.dumps([type(model).__name__, rows]))
"""


def tensors_of(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    model = config.build("cpu")
    initialise(model, seed)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", EXPORTED)
def test_import_and_export_give_back_the_files(saved: Saved, tmp_path: Path, name: str) -> None:
    """hf -> ours -> hf: the same tensors to the bit, and a config.json that means the same."""
    _, folder = saved(name)
    config, tensors = load_hf(folder)
    found = export_hf(config, tensors, None, tmp_path / "out")
    assert found.relative <= 1e-5
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    again, _ = load_hf(tmp_path / "out")
    assert canonical(again) == canonical(config)


@pytest.mark.slow
def test_the_export_works_where_our_code_is_not(saved: Saved, tmp_path: Path) -> None:
    """transformers in an isolated process: equal logits, and 64 greedily chosen tokens for ragged prompts."""
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [90, 3, 44]]
    expected = []
    folders = []
    for name in ("llama-llama3", "qwen3"):
        _, folder = saved(name)
        config, tensors = load_hf(folder)
        place = tmp_path / name
        place.mkdir()
        export_hf(config, tensors, None, place / "export")
        ours = build_model(config, tensors)
        tokens = check_tokens(97, 100, seed=5)
        torch.save({"tokens": tokens, "prompts": [torch.tensor(p) for p in prompts]}, place / "given.pt")
        with torch.no_grad():
            logits = ours.head(ours(tokens, SeqInfo.contiguous(*tokens.shape)).hidden)
        greedy = [c.tokens for c in Engine(ours).generate(prompts, Sampling(temperature=0, max_new_tokens=64))]
        expected.append((name, logits, greedy))
        folders.append(str(place / "export"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    hidden = _without_our_install()
    done = subprocess.run(
        [sys.executable, "-I", "-c", hidden + ELSEWHERE, *folders],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [line[0] for line in lines] == ["LlamaForCausalLM", "Qwen3ForCausalLM"]
    for (name, logits, greedy), (_, rows) in zip(expected, lines, strict=True):
        found = torch.load(tmp_path / name / "logits.pt", weights_only=True)
        assert float((found - logits).abs().max()) <= 1e-5 * float(logits.abs().max())
        assert rows == greedy


def _without_our_install() -> str:
    """Code that takes an installation of this project (also an editable one) out of the way."""
    return (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('llm', 'launch', 'evals', 'vision'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )


def llama(**changes: Any) -> dict[str, Any]:
    block = {"mixer": {"type": "attention", "n_heads": 4, "n_kv_heads": 2}, "channel": "swiglu"}
    return {
        "vocab_size": 257,
        "d_model": 32,
        "max_seq_len": 64,
        "layers": [{"pattern": [block], "repeat": 2}],
        **changes,
    }


def with_block(**changes: Any) -> dict[str, Any]:
    tree = llama()
    tree["layers"][0]["pattern"][0].update(changes)
    return tree


def with_mixer(**changes: Any) -> dict[str, Any]:
    return with_block(mixer={"type": "attention", "n_heads": 4, "n_kv_heads": 2, **changes})


def test_a_trained_model_with_tokenizer(tmp_path: Path) -> None:
    """Sharded export with a tokenizer: the folder is complete, and both sides read it."""
    from transformers import AutoTokenizer

    config = ModelConfig.model_validate(llama())
    tensors = tensors_of(config)
    out = tmp_path / "out"
    tokenizer = BytesTokenizer()
    facts = {"run": "a|b"}
    export_hf(config, tensors, tokenizer, out, ExportOptions(max_shard_bytes=20_000, title="Tiny"), facts=facts)
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "model.safetensors.index.json",
    } <= names
    assert sum(name.startswith("model-0") for name in names) > 2
    card = (out / "README.md").read_text()
    assert "# Tiny" in card and "a\\|b" in card and "largest difference" in card
    theirs = AutoTokenizer.from_pretrained(out)
    text = "h\u00e9 \U0001f600\n\tx"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id
    model, found, _ = load_model(out)
    assert found.hash == tokenizer.hash
    torch.testing.assert_close(
        dict(model.named_parameters())["embed.weight"].data, tensors["embed.weight"], rtol=0, atol=0
    )
    assert not list(tmp_path.glob(".*partial*"))


def test_bf16_states_what_the_rounding_did(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(llama())
    parity = export_hf(config, tensors_of(config), None, tmp_path / "out", ExportOptions(dtype="bf16"))
    assert parity.relative <= 1e-5
    assert parity.rounding is not None and 1e-4 < parity.rounding < 0.1
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_ntk_scaling_becomes_a_base(tmp_path: Path) -> None:
    tree = llama(position={"type": "rope", "scaling": {"type": "ntk", "factor": 4.0}})
    config = ModelConfig.model_validate(tree)
    assert export_hf(config, tensors_of(config), None, tmp_path / "out").relative <= 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] > 40000


OTHER_SHAPES = [
    (with_mixer(window=8), r"model\.blocks\.0\.mixer\.window is 8"),
    (with_mixer(softcap=5.0), r"mixer\.softcap is 5\.0"),
    (with_mixer(qkv_bias=True), r"mixer\.out_bias is False, LlamaForCausalLM has True"),
    (with_mixer(scale=1.0), r"mixer\.scale is 1\.0"),
    (with_mixer(qk_norm={"type": "rms_norm", "eps": 1e-3}), r"qk_norm\.eps is 0\.001"),
    (with_block(channel="geglu"), "channel is 'geglu'"),
    (with_block(channel={"type": "mlp"}), "channel is 'mlp'"),
    (with_block(residual="sandwich"), r"residual\.type is 'sandwich'"),
    (with_block(norm={"type": "layer_norm"}), "layer 0 has a norm of its own"),
    (with_block(position="none"), "layer 0 has a position of its own"),
    (llama(norm="layer_norm"), "model.norm is 'layer_norm'"),
    (llama(norm={"type": "rms_norm", "affine": False}), r"norm\.affine is False"),
    (llama(final_norm={"type": "rms_norm", "eps": 1e-2}), r"final_norm\.eps is 0\.01"),
    (llama(position="learned"), "model.position is 'learned'"),
    (llama(position={"type": "rope", "fraction": 0.5}), r"position\.fraction is 0\.5"),
    (llama(position={"type": "rope", "interleaved": True}), r"position\.interleaved is True"),
    (llama(embed={"scale": 2.0}), r"model\.embed\.scale is 2\.0"),
    (llama(embed={"norm": "rms_norm"}), r"model\.embed\.norm is"),
    (llama(head={"softcap": 30.0}), r"model\.head\.softcap is 30\.0"),
    (llama(head={"bias": True}), r"model\.head\.bias is True"),
]


@pytest.mark.parametrize(("tree", "message"), OTHER_SHAPES, ids=[message[:40] for _, message in OTHER_SHAPES])
def test_other_shapes_are_refused_by_key(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf_config(ModelConfig.model_validate(tree))


def test_what_does_not_change_the_model_does_not_matter() -> None:
    tree = with_mixer(backend="sdpa")
    tree |= {"dropout": 0.1, "init": {"std": 0.5}, "embed": {"std": 0.1}, "linear": {"*": "dense"}}
    assert hf_config(ModelConfig.model_validate(tree))[0].model_type == "llama"


def test_different_logits_stop_the_export_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.model_validate(llama())
    tensors = tensors_of(config)

    def mistaken(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return model.head(model(tokens, SeqInfo.contiguous(*tokens.shape)).hidden).float() * (1 + 3e-5)

    monkeypatch.setattr(parity_module, "logits_of", mistaken)
    with pytest.raises(UserError, match="export refused: the logits .* differ"):
        export_hf(config, tensors, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_stops_the_export(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(llama())
    tensors = tensors_of(config)
    tensors["final_norm.weight"][0] = torch.nan
    with pytest.raises(UserError, match="export refused"):
        export_hf(config, tensors, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_respected(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(llama())
    tensors = tensors_of(config)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    for options, message in (
        (ExportOptions(), "is not empty"),
        (ExportOptions(overwrite=True), "is no earlier export"),
    ):
        with pytest.raises(UserError, match=message):
            export_hf(config, tensors, None, out, options)
    assert (out / "precious.txt").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        export_hf(config, tensors, None, tmp_path / "file")
    export_hf(config, tensors, None, tmp_path / "second")
    export_hf(config, tensors_of(config, 1), None, tmp_path / "second", ExportOptions(overwrite=True))
    assert torch.equal(
        load_file(tmp_path / "second" / "model.safetensors")["model.embed_tokens.weight"],
        tensors_of(config, 1)["embed.weight"],
    )
