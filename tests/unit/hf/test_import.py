"""Import from Hugging Face's layout: the same logits, and a readable refusal of everything else."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.checkpoint.hf import build_model, is_hf_folder, load_hf
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from tests.unit.hf.conftest import MODELS

Saved = Callable[..., tuple[Any, Path]]


@torch.no_grad()
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_equal(saved: Saved, name: str) -> None:
    theirs, folder = saved(name)
    config, tensors = load_hf(folder)
    assert is_hf_folder(folder)
    ours = build_model(config, tensors)
    tokens = torch.randint(0, 97, (2, 100))
    expected = theirs(tokens).logits
    found = ours.head(ours(tokens, SeqInfo.contiguous(2, 100)).hidden)
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_shards_are_read(saved: Saved) -> None:
    theirs, folder = saved("llama", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    _, tensors = load_hf(folder)
    torch.testing.assert_close(tensors["embed.weight"], theirs.model.embed_tokens.weight.data, rtol=0, atol=0)


def test_old_spelling_of_rope(saved: Saved) -> None:
    """config.json as transformers 4 wrote it."""
    _, folder = saved("llama-llama3")
    new, _ = load_hf(folder)
    hf = json.loads((folder / "config.json").read_text())
    rope = hf.pop("rope_parameters")
    hf |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(hf))
    assert load_hf(folder)[0] == new


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Bomb:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a file was unpickled",)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def missing(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))  # type: ignore[arg-type, return-value]


def unknown(folder: Path) -> None:
    rewrite(folder, lambda t: t.update(extra=torch.zeros(2)))


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(49)}))


def whole_numbers(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int64)}))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def climbing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}})
    )


def index_of_a_missing_file(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_lies(folder: Path) -> None:
    index = {"weight_map": {"model.other.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (only_pickle, "only in pytorch_model.bin, a pickle file"),
    (truncated, "model.safetensors is damaged or cut short"),
    (garbage, "model.safetensors is damaged or cut short"),
    (missing, "1 tensors are missing, the first is model.layers.1.mlp.up_proj.weight"),
    (unknown, "the first is extra"),
    (wrong_shape, r"tensor model.norm.weight has shape \[49\], config.json asks for \[48\]"),
    (whole_numbers, "model.norm.weight holds torch.int64"),
    (no_weights, "no weights in"),
    (no_config, "no config.json in"),
    (broken_config, "config.json is not valid JSON"),
    (list_config, "must hold a JSON object"),
    (climbing_index, "names '../secret.safetensors'; only .safetensors files of the same folder"),
    (index_of_a_missing_file, "model-00001-of-00002.safetensors is missing"),
    (index_that_lies, "lacks tensor model.other.weight"),
    (lambda folder: edit(folder, model_type="bert"), "model_type 'bert' cannot be imported"),
    (lambda folder: edit(folder, hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
    (lambda folder: edit(folder, hidden_size="big"), "hidden_size is 'big'; a whole number"),
    (lambda folder: edit(folder, num_hidden_layers=-1), "num_hidden_layers is -1"),
    (lambda folder: edit(folder, num_key_value_heads=3), "n_heads 4 is not divisible by n_kv_heads 3"),
    (lambda folder: edit(folder, quantization_config={"bits": 4}), "quantised weights"),
    (lambda folder: edit(folder, rope_parameters={"rope_type": "longrope"}), "rope type 'longrope' cannot be read"),
    (lambda folder: edit(folder, rope_parameters={"rope_type": "linear"}), "rope type 'linear' needs a factor"),
    (lambda folder: edit(folder, num_hidden_layers=3), "tensors are missing, the first is model.layers.2"),
]


@pytest.mark.parametrize(("harm", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_what_is_broken_is_refused(saved: Saved, harm: Callable[[Path], None], message: str) -> None:
    _, folder = saved("llama")
    harm(folder)
    with pytest.raises(UserError, match=message) as raised:
        load_hf(folder)
    assert "\n" not in str(raised.value)


def test_no_folder() -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_hf("/nonexistent/model")


def test_build_refuses_tensors_that_do_not_fit(saved: Saved) -> None:
    _, folder = saved("llama-tied-biased")
    config, tensors = load_hf(folder)
    without = {name: tensor for name, tensor in tensors.items() if name != "final_norm.weight"}
    for given, message in (
        (without, "1 tensor missing: final_norm.weight"),
        ({**tensors, "final_norm.wait": tensors["final_norm.weight"]}, r"nearest known name: final_norm\.weight"),
        ({**tensors, "final_norm.weight": torch.zeros(3)}, r"final_norm.weight has shape \[3\]"),
        ({**tensors, "unembed.weight": tensors["embed.weight"] + 1}, "unembed.weight differs from embed.weight"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(config, given, source="here")
    assert build_model(config, {**tensors, "unembed.weight": tensors["embed.weight"].clone()}).is_tied()
