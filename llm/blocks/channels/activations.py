"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
}
"""relu2 is relu(x)^2 (So et al. 2021, Primer)."""


def gated(joined: Tensor, name: str) -> Tensor:
    """act(gate) * up of [..., 2 * hidden], gate first: [..., hidden]. Eager code keeps nothing but `joined` for the
    backward pass and writes both gradients into one tensor."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or name not in ("silu", "gelu", "gelu_tanh"):
        gate, up = joined.chunk(2, dim=-1)
        return ACTIVATIONS[name](gate) * up
    return _Gated.apply(joined, name)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, name: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(joined)
        ctx.name = name
        gate, up = joined.chunk(2, dim=-1)
        return ACTIVATIONS[name](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (joined,) = ctx.saved_tensors
        gate, up = joined.chunk(2, dim=-1)
        out = torch.empty_like(joined)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(ACTIVATIONS[ctx.name](gate), grad, out=d_up)
        if ctx.name == "silu":
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        else:
            form = "tanh" if ctx.name == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(grad * up, gate, approximate=form, grad_input=d_gate)
        return out, None
