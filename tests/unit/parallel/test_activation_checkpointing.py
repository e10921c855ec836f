"""Checkpointing changes what is kept, never a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.parallel.activation_checkpointing import checkpoint_blocks
from tests.distributed.steps import VOCAB, tiny_model


def gradients(mode: str, *, dropout: float = 0.0, count: list[int] | None = None) -> dict[str, Tensor]:
    """Gradients of a tiny model; `count` receives the calls of the first block's output layer."""
    model = tiny_model(dropout=dropout).build("cpu")
    initialise(model, 0)
    model.tie()
    checkpoint_blocks(model, mode)  # type: ignore[arg-type]
    if count is not None:
        model.layers[0].mixer.out.register_forward_hook(lambda *_: count.append(1))  # type: ignore[union-attr]
    torch.manual_seed(5)
    tokens = torch.randint(VOCAB, (2, 12))
    model.head(model(tokens, SeqInfo.contiguous(2, 12)).hidden).logsumexp(-1).sum().backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_equal_to_the_bit(mode: str, dropout: float) -> None:
    plain, checkpointed = gradients("none", dropout=dropout), gradients(mode, dropout=dropout)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        assert torch.equal(grad, checkpointed[name]), name


@pytest.mark.parametrize(("mode", "calls"), [("none", 1), ("selective", 2), ("full", 2)])
def test_blocks_run_again_in_the_backward_pass(mode: str, calls: int) -> None:
    count: list[int] = []
    gradients(mode, count=count)
    assert len(count) == calls


def kept_bytes(mode: str) -> int:
    model = tiny_model().build("cpu")
    initialise(model, 0)
    checkpoint_blocks(model, mode)  # type: ignore[arg-type]
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(VOCAB, (4, 16)), SeqInfo.contiguous(4, 16))
    return sum(seen.values())


def test_full_keeps_less() -> None:
    assert kept_bytes("full") < 0.5 * kept_bytes("none")


def test_names_stay() -> None:
    plain, checkpointed = tiny_model().build("meta"), tiny_model().build("meta")
    checkpoint_blocks(checkpointed, "full")
    assert list(plain.state_dict()) == list(checkpointed.state_dict())


def test_decoding_is_left_alone() -> None:
    model = tiny_model().build("cpu")
    initialise(model, 0)
    checkpoint_blocks(model, "full")
    state = model.new_state(1, 16, dtype=torch.float32, device="cpu")
    tokens = torch.randint(VOCAB, (1, 8))
    whole = model(tokens, SeqInfo.contiguous(1, 8)).hidden
    stepped = model(tokens, SeqInfo.contiguous(1, 8), state=state).hidden
    torch.testing.assert_close(whole, stepped)
