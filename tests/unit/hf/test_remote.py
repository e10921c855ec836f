"""Export with code: every registered part runs in transformers without this project, and comes back to the bit."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from evals.export_matrix import Row, cases, matrix, small_model, weights
from llm.blocks.base import CHANNELS, MIXERS
from llm.checkpoint.hf import ExportOptions, build_model, load_hf
from llm.checkpoint.hf.parity import check_tokens, logits_of
from llm.checkpoint.hf.remote import bundle as bundle_module
from llm.checkpoint.hf.remote.bundle import bundle
from llm.checkpoint.hf.remote.export import export_remote, planned
from llm.checkpoint.hf.shape import hf_config
from llm.core.errors import UserError
from llm.data.tokenizer.simple import BytesTokenizer
from llm.models.config import ModelConfig
from llm.models.extract import extract
from llm.models.nesting import whole_widths
from llm.models.wrappers.base import WRAPPERS

ALL = cases()
FAST = [("mixer", "mamba2"), ("mixer", "retention"), ("linear", "memory_layer"), ("wrapper", "rmt")]


def check(rows: list[Row]) -> None:
    assert rows
    wrong = [row.line() for row in rows if not row.good]
    assert not wrong, "\n".join(wrong)


def test_some_parts_run_without_the_project(tmp_path: Path) -> None:
    rows, foreign = matrix({key: ALL[key] for key in FAST}, tmp_path)
    check(rows)
    assert not {"pydantic", "omegaconf"} & set(foreign)


def test_the_interpreter_of_another_environment(tmp_path: Path) -> None:
    chosen = {("mixer", "retention"): ALL["mixer", "retention"]}
    rows, foreign = matrix(chosen, tmp_path / "here", sys.executable)
    check(rows)
    assert not {"pydantic", "omegaconf"} & set(foreign)
    with pytest.raises(UserError, match="cannot start /nowhere/python to check the export"):
        matrix(chosen, tmp_path / "nowhere", "/nowhere/python")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_runs_without_the_project(tmp_path: Path) -> None:
    check(matrix(ALL, tmp_path)[0])


def test_bundles_hold_what_the_config_needs_and_no_more() -> None:
    files = bundle(ALL["mixer", "mamba2"])
    assert "llm_blocks_mixers_mamba2.py" in files and "llm_blocks_mixers_retention.py" not in files
    for name, text in files.items():
        compile(text, name, "exec")
        assert "SPDX-License-Identifier: Apache-2.0" in text.splitlines()[0]
        assert not re.search(r"^\s*(from|import) (llm|kernels|pydantic|pydantic_core)\b", text, re.MULTILINE), name


Exported = tuple[ModelConfig, dict[str, torch.Tensor], Path]


def export_rmt(out: Path, **options: Any) -> Exported:
    config = small_model("wrapper", WRAPPERS.entry("rmt").tiny()).replace(vocab_size=300)
    tensors = weights(config)
    export_remote(config, tensors, BytesTokenizer(), out, ExportOptions(**options))
    return config, tensors, out


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_rmt(tmp_path_factory.mktemp("remote") / "out")


@pytest.fixture
def exported(once: Exported, tmp_path: Path) -> Exported:
    config, tensors, out = once
    shutil.copytree(out, tmp_path / "out")
    return config, tensors, tmp_path / "out"


def test_sharded_bf16(tmp_path: Path) -> None:
    config, tensors, out = export_rmt(tmp_path / "out", dtype="bf16", max_shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    again, back = load_hf(out)
    assert again == config
    assert all(torch.equal(back[name], tensors[name].bfloat16()) for name in back)
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card and "rounding the weights to bfloat16" in card
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_wrong_logits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bundle_module._rewritten

    def other(module: str) -> tuple[str, list[str]]:
        text, needed = real(module)
        return text.replace("x = x * self.scale", "x = x * self.scale * 1.01"), needed

    monkeypatch.setattr(bundle_module, "_rewritten", other)
    config = ALL["mixer", "mamba2"].replace(embed={"scale": 2.0})
    with pytest.raises(UserError, match="export refused: the logits .* differ"):
        export_remote(config, weights(config), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_slices_of_a_nested_model(tmp_path: Path) -> None:
    """The same width in all layers is a plain shape; a width per layer is not, and takes its code along."""
    config = small_model("channel", CHANNELS.entry("nested_gated").tiny())
    tensors = weights(config)
    whole = whole_widths(config)
    hf_config(extract(config, tensors, [whole[0] // 2] * 2)[0])
    mixed, cut = extract(config, tensors, [whole[0] // 2, whole[1]])
    with pytest.raises(UserError, match="cannot export"):
        hf_config(mixed)
    assert export_remote(mixed, cut, None, tmp_path / "out").relative <= 1e-5


def _pickle(out: Path) -> None:
    torch.save({"a": torch.ones(1)}, out / "model.safetensors")


def _cut(out: Path) -> None:
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[: len(data) // 2])


def _key(out: Path) -> None:
    tree = json.loads((out / "config.json").read_text())
    tree["manyformer"]["layer"] = 1
    (out / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("harm", "message"), [(_pickle, "damaged or cut short"), (_cut, "damaged or cut short"), (_key, "layer")]
)
def test_what_is_broken_is_refused(exported: Exported, harm: Callable[[Path], None], message: str) -> None:
    _, _, out = exported
    harm(out)
    with pytest.raises(UserError, match=message) as error:
        load_hf(out)
    assert "\n" not in str(error.value)


def test_with_the_project_no_remote_code_is_needed(exported: Exported, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import llm.hf

    config, tensors, out = exported
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(model) is llm.hf.ManyformerForCausalLM
    tokens = check_tokens(300, 40)
    mine = logits_of(build_model(config, tensors), tokens)
    assert torch.equal(model(tokens, use_cache=False).logits, mine)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_manyformer.py").read_text() == (out / "modeling_manyformer.py").read_text()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_hf(tmp_path / "again")[1].items())


def test_padding_beams_and_copies() -> None:
    from llm.hf import ManyformerConfig, ManyformerForCausalLM

    config = ALL["mixer", "mamba2"]
    torch.manual_seed(0)
    model = ManyformerForCausalLM(ManyformerConfig(manyformer=config.to_dict())).eval()
    model.load_state_dict({p.name: p.make() for p in planned(config, weights(config))}, strict=False)
    model.tie_weights()
    tokens = check_tokens(29, 12)
    alone = model(tokens[:1, 5:], use_cache=False).logits
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    for use_cache in (False, True):
        torch.testing.assert_close(model(tokens, attention_mask=mask, use_cache=use_cache).logits[:1, 5:], alone)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options))
    cache = model(tokens, use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    first = model(tokens[:, :3], past_key_values=cache).logits
    torch.testing.assert_close(model(tokens[:, :3], past_key_values=other).logits, first)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"position_ids": torch.arange(4)[None]}, "attention_mask instead"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "4 dimensions"),
        ({"output_attentions": True}, "not offered"),
        ({"past_key_values": object()}, "new_cache"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    from llm.hf import ManyformerConfig, ManyformerForCausalLM

    model = ManyformerForCausalLM(
        ManyformerConfig(manyformer=small_model("mixer", MIXERS.entry("retention").tiny()).to_dict())
    )
    with pytest.raises(ValueError, match=message):
        model(torch.ones(1, 4, dtype=torch.int64), **keys)
