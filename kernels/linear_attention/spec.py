"""Linear attention with decay: what is computed, what may be asked, and how an implementation is checked.

Per head, S [K, V] and a decay d_t = exp(log_decay_t):

    S_t = d_t S_{t-1} + k_t v_tᵀ        y_t = q_t S_t        S is zero before the first token of each document.

q, k [B, T, G, K], v [B, T, H, V], H a multiple of G: value head h reads query-key head h // (H / G). log_decay <= 0:
[B, T, H], or [H] where it never changes. starts [B, T]: first tokens of documents. valid [B, T]: False for padding on
the right, which changes no state and whose outputs mean nothing.

A decay below exp(-30) (in fp64 exp(-100)), such as that of a gate which is shut, may count as just that: sums of log
decays over a chunk stay exact enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import OpSpec, Tolerance, register_op

SMALLEST_LOG_DECAY = {torch.float32: -30.0, torch.float64: -100.0}


@dataclass(frozen=True)
class LinearAttentionQuery:
    """Inputs of `dtype` on `device`; decay: log_decay is given."""

    device: str
    dtype: torch.dtype
    decay: bool


def sample_inputs(
    device: torch.device | str, dtype: torch.dtype, *, length: int = 37, decay: bool = True, groups: int = 2
) -> dict[str, Tensor | None]:
    """Odd sizes, non-contiguous values, several documents, ragged rows and a state, by a fixed seed."""
    batch, heads, d_key, d_value = 2, 4, 5, 3
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    positions = torch.arange(length)
    starts = torch.stack([positions == length // 3, (positions == 2) | (positions == length - 2)])
    valid = torch.stack([positions < length, positions < max(1, length - 5)])
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "q": normal(batch, length, groups, d_key),
        "k": normal(batch, length, groups, d_key),
        "v": normal(batch, length, d_value, heads).transpose(2, 3),
        "log_decay": -torch.nn.functional.softplus(normal(batch, length, heads).to(wide)) if decay else None,
        "starts": starts.to(device),
        "state": normal(batch, heads, d_key, d_value).to(wide),
        "valid": valid.to(device),
    }


def outcome(impl: Any, inputs: Mapping[str, Tensor | None], dtype: torch.dtype, **options: int) -> dict[str, Tensor]:
    """Outputs (zero at padding), the final state and the gradients of a fixed scalar, by name."""
    wide = torch.promote_types(dtype, torch.float32)
    given: dict[str, Any] = {}
    for name, value in inputs.items():
        if value is not None and value.is_floating_point():
            value = value.detach().to(wide if name in ("log_decay", "state") else dtype).requires_grad_()
        given[name] = value
    y, state = impl.run(**given, **options)
    valid = given.get("valid")
    if valid is not None:
        y = torch.where(valid[..., None, None], y, 0.0)
    ramp = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    end = torch.linspace(1.0, -0.5, state.numel(), dtype=torch.float64, device=y.device).view(state.shape)
    loss = (y.double() * ramp).sum() + (state.double() * end).sum()
    leaves = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    found = {"output": y.detach(), "state": state.detach()}
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}


def check_linear_attention(impl: Any, query: LinearAttentionQuery, device: torch.device) -> str | None:
    """Compare outputs, state and gradients with the reference in fp64."""
    from kernels.linear_attention.reference import REFERENCE

    tolerance = LINEAR_ATTENTION.tolerances[query.dtype]
    inputs = sample_inputs(device, query.dtype, decay=query.decay)
    wanted = outcome(REFERENCE, inputs, torch.float64)
    for name, value in outcome(impl, inputs, query.dtype, chunk=8).items():
        fault = tolerance.fault(name, value, wanted[name])
        if fault is not None:
            return fault
    return None


LINEAR_ATTENTION = register_op(
    OpSpec(
        "linear_attention",
        tolerances={
            torch.float64: Tolerance(1e-10, 1e-8),
            torch.float32: Tolerance(1e-5, 1e-5),
            torch.float16: Tolerance(1e-2, 1e-2),
            torch.bfloat16: Tolerance(3e-2, 3e-2),
        },
        check=check_linear_attention,
    )
)
