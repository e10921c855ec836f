"""Saved prompt states: what is read and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm.core.errors import UserError
from llm.core.init import initialise
from llm.generate.engine import Engine
from llm.generate.prefix import Prefix, fingerprint
from llm.generate.sampling import Sampling
from llm.models.config import ModelConfig
from llm.models.nesting import at_widths
from tests.unit.generate.test_engine import build

TEXT = [5, 6, 7, 8]
ONE = Sampling(temperature=0, max_new_tokens=1)


def test_only_what_follows_is_read() -> None:
    model = build("gqa")
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    prefix = Prefix.read(model, TEXT, capacity=64, chunk=2)
    assert seen == [2, 1]
    Engine(model, prefix=prefix).generate([[*TEXT, 1, 2]], ONE)
    assert seen == [2, 1, 3]


@pytest.mark.parametrize(
    ("prompt", "message"), [([5, 6, 9, 8, 1], "differs from it at token 2"), ([5, 6, 7], "has only 3")]
)
def test_a_prompt_must_go_on_from_the_text(prompt: list[int], message: str) -> None:
    model = build("gqa")
    engine = Engine(model, prefix=Prefix.read(model, TEXT, capacity=64))
    with pytest.raises(UserError, match=message):
        engine.generate([prompt], ONE)


def test_another_model_and_another_context_are_refused() -> None:
    model, other = build("gqa"), build("gqa")
    prefix = Prefix.read(model, TEXT, capacity=64)
    assert fingerprint(other) == prefix.model
    with torch.no_grad():
        next(iter(other.parameters()))[0, 0] += 1
    with pytest.raises(UserError, match="other weights"):
        Engine(other, prefix=prefix)
    with pytest.raises(UserError, match="context=64"):
        Engine(model, context=32, prefix=prefix)
    with pytest.raises(UserError, match="at most 3 tokens"):
        Prefix.read(model, TEXT, capacity=4)
    with pytest.raises(UserError, match="at least one"):
        Prefix.read(model, TEXT[:1], capacity=4)


def test_precision_and_widths_belong_to_the_model() -> None:
    nested = {"type": "nested_gated", "d_hidden": 48}
    block = {"mixer": {"type": "attention", "n_heads": 4}, "channel": nested}
    model = ModelConfig.model_validate(
        {"vocab_size": 9, "d_model": 32, "max_seq_len": 8, "layers": [{"pattern": [block]}]}
    )
    built = model.build("cpu")
    initialise(built, 0)
    whole = fingerprint(built)
    with at_widths(built, [24]):
        assert fingerprint(built) != whole
    assert fingerprint(built) == whole != fingerprint(built.to(torch.bfloat16))


def test_files_that_are_no_state(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"tokens": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no saved state of a prompt"):
        Prefix.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="cannot read the saved state"):
        Prefix.load(tmp_path / "text")
    with pytest.raises(UserError, match="cannot read the saved state"):
        Prefix.load(tmp_path / "missing")
