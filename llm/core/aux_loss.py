"""Auxiliary losses attached to an activation: a block adds one without any plumbing through the model.

`attach_aux(x, loss)` returns x; in the backward pass `loss` receives the gradient `scale()`, which the training step
sets to (valid tokens of the microbatch) / (global valid tokens), the same weight as that of the main loss.

Compiled code goes through custom operators, which the compiler leaves as they are: it would otherwise freeze the scale
of the first step into the graph, and drop the recording of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_scale: list[float | Tensor] = [1.0]
_values: dict[str, Tensor] = {}


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = loss.dtype
        ctx.shape = loss.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, _current_scale(grad).to(ctx.dtype).expand(ctx.shape)


@torch.library.custom_op("manyformer::attach_aux", mutates_args=())
def _attach_op(x: Tensor, loss: Tensor, weight: float, name: str) -> Tensor:
    _record(name, loss)
    return x.clone()


@_attach_op.register_fake
def _(x: Tensor, loss: Tensor, weight: float, name: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("manyformer::aux_scale", mutates_args=())
def _scale_op(grad: Tensor) -> Tensor:
    return _current_scale(grad).clone()


@_scale_op.register_fake
def _(grad: Tensor) -> Tensor:
    return grad.new_empty((), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float, str], output: Tensor) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.weight = inputs[2]


def _attach_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return grad, (_scale_op(grad) * ctx.weight).to(ctx.dtype), None, None


_attach_op.register_autograd(_attach_backward, setup_context=_save)


def _current_scale(grad: Tensor) -> Tensor:
    return torch.as_tensor(_scale[-1], dtype=torch.float32, device=grad.device)


def _record(name: str, loss: Tensor) -> None:
    _values[name] = loss.detach().clone()


def attach_aux(x: Tensor, loss: Tensor, *, weight: float, name: str) -> Tensor:
    """Add `weight * loss` (a scalar, mean over the microbatch's tokens) to the training loss through x.

    x must lie on the way to the loss; compiled code copies it, so take a small one, such as router weights.
    The unweighted value is kept under `name` until `take_values` is called.
    """
    if torch.compiler.is_compiling():
        return _attach_op(x, loss, weight, name)
    _record(name, loss)
    return _Attach.apply(x, loss * weight) if torch.is_grad_enabled() else x


@contextmanager
def scale(value: float | Tensor) -> Iterator[None]:
    """Set the gradient that attached losses receive in backward passes run inside the block."""
    _scale.append(value)
    try:
        yield
    finally:
        _scale.pop()


def take_values() -> dict[str, Tensor]:
    """Values recorded since the last call, by name."""
    taken = dict(_values)
    _values.clear()
    return taken
