"""The delta rule, with decay or without: what is computed, what may be asked, and how an implementation is checked.

Per head, S [K, V], a step size beta_t and a decay d_t = exp(log_decay_t): the decayed state is moved so that it answers
the key k_t with more of the value v_t,

    u_t = beta_t (v_t - k_t d_t S_{t-1})        S_t = d_t S_{t-1} + k_t u_tᵀ        y_t = q_t S_t

which is S_t = d_t (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ: the gradient is taken at the decayed state, as in
Gated DeltaNet. S is zero before the first token of each document. A step is a contraction for 0 <= beta |k|^2 <= 2.

q, k [B, T, G, K], v [B, T, H, V], H a multiple of G: value head h reads query-key head h // (H / G). beta [B, T, H].
log_decay, starts, valid and the smallest decay as in `kernels.linear_attention.spec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import OpSpec, Tolerance, register_op
from kernels.linear_attention import spec as linear_attention


@dataclass(frozen=True)
class DeltaRuleQuery:
    """Inputs of `dtype` on `device`; decay: log_decay is given."""

    device: str
    dtype: torch.dtype
    decay: bool


def sample_inputs(
    device: torch.device | str, dtype: torch.dtype, *, length: int = 37, decay: bool = True, groups: int = 2
) -> dict[str, Tensor | None]:
    """Those of linear attention with keys of length 1 and step sizes in (0, 2)."""
    inputs = linear_attention.sample_inputs(device, torch.float64, length=length, decay=decay, groups=groups)
    wide = torch.promote_types(dtype, torch.float32)
    assert inputs["k"] is not None and inputs["v"] is not None
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    generator = torch.Generator().manual_seed(1)
    batch, _, heads, _ = inputs["v"].shape
    beta = 2 * torch.rand(batch, length, heads, generator=generator, dtype=torch.float64).to(device)
    return {
        name: value.to(wide if name in ("log_decay", "state", "beta") else dtype)
        if value is not None and value.is_floating_point()
        else value
        for name, value in (inputs | {"beta": beta}).items()
    }


def check_delta_rule(impl: Any, query: DeltaRuleQuery, device: torch.device) -> str | None:
    """Compare outputs, state and gradients with the reference in fp64."""
    from kernels.delta_rule.reference import REFERENCE

    tolerance = DELTA_RULE.tolerances[query.dtype]
    inputs = sample_inputs(device, query.dtype, decay=query.decay)
    wanted = linear_attention.outcome(REFERENCE, inputs, torch.float64)
    for name, value in linear_attention.outcome(impl, inputs, query.dtype, chunk=8).items():
        fault = tolerance.fault(name, value, wanted[name])
        if fault is not None:
            return fault
    return None


DELTA_RULE = register_op(
    OpSpec(
        "delta_rule",
        tolerances={
            torch.float64: Tolerance(1e-10, 1e-8),
            torch.float32: Tolerance(1e-5, 1e-5),
            torch.float16: Tolerance(1e-2, 1e-2),
            torch.bfloat16: Tolerance(4e-2, 4e-2),
        },
        check=check_delta_rule,
    )
)
