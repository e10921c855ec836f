"""Auxiliary losses: gradient, scale, recorded values; under checkpointing and compilation too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm.core import aux_loss


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    aux_loss.take_values()
    yield
    assert aux_loss.take_values() == {}
    torch._dynamo.reset()


def _block(x: Tensor, w: Tensor) -> Tensor:
    y = torch.tanh(x @ w)
    return aux_loss.attach_aux(y, y.pow(2).mean(), weight=0.5, name="square")


def _compiled(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_block, fullgraph=True, backend=backend)


def _checkpointed(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(_block, x, w, use_reentrant=False)


def _both(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(_compiled("aot_eager"), x, w, use_reentrant=False)


WAYS = {
    "eager": lambda: _block,
    "checkpointed": lambda: _checkpointed,
    "compiled": lambda: _compiled("aot_eager"),
    "compiled_eager": lambda: _compiled("eager"),
    "checkpointed_compiled": lambda: _both,
}


@pytest.mark.parametrize("way", WAYS)
def test_gradient_is_that_of_the_added_loss(way: str) -> None:
    call = WAYS[way]()
    for scale in (1.0, 0.25, torch.tensor(3.0)):
        x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        with aux_loss.scale(scale):
            (call(x, w) * 2).sum().backward()
        y = torch.tanh(x @ w)
        square = y.pow(2).mean()
        expected = torch.autograd.grad((y * 2).sum() + 0.5 * scale * square, (x, w))
        assert x.grad is not None and w.grad is not None
        torch.testing.assert_close((x.grad, w.grad), expected)
        values = aux_loss.take_values()
        assert list(values) == ["square"] and not values["square"].requires_grad
        torch.testing.assert_close(values["square"], square.detach())


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_output_is_unchanged_and_values_are_kept_without_gradients(way: str) -> None:
    x, w = torch.randn(4, 3), torch.randn(3, 2)
    with torch.no_grad():
        assert torch.equal(WAYS[way]()(x, w), torch.tanh(x @ w))
    assert set(aux_loss.take_values()) == {"square"}


def test_scales_nest_and_end() -> None:
    x = torch.ones(2, requires_grad=True)
    with aux_loss.scale(2.0), aux_loss.scale(5.0):
        aux_loss.attach_aux(x.detach(), (x * 3).sum(), weight=1.0, name="a").sum().backward()
    assert x.grad is not None and x.grad.tolist() == [15.0, 15.0]
    aux_loss.attach_aux(x.detach(), (x * 3).sum(), weight=1.0, name="a").sum().backward()
    assert x.grad.tolist() == [18.0, 18.0]
    aux_loss.take_values()


def test_low_precision_losses_keep_their_dtype() -> None:
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    aux_loss.attach_aux(x * 1, x.sum(), weight=0.5, name="a").sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.tolist() == [1.5, 1.5]
    aux_loss.take_values()
