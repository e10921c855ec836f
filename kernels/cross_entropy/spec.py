"""Cross-entropy of an output layer: the operation and how an implementation is checked.

logits = hidden @ weight^T + bias, then softcap * tanh(logits / softcap); lse = log sum exp(logits);
nll = lse - logits[label]; total = sum over tokens with a label of token_weight * (nll + z_loss * lse^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import OpSpec, Tolerance, register_op


class CrossEntropy(NamedTuple):
    """total: fp32 scalar, the only part that carries gradients. nll, lse: [N] fp32 per token, zero where ignored."""

    total: Tensor
    nll: Tensor
    lse: Tensor


@dataclass(frozen=True)
class CrossEntropyForm:
    """What stays the same from call to call. chunk: tokens whose logits are held at once; None: all."""

    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class CrossEntropyQuery:
    """hidden states of `dtype` on `device`."""

    device: str
    dtype: torch.dtype
    form: CrossEntropyForm
    bias: bool = False


def check_cross_entropy(impl: Any, query: CrossEntropyQuery, device: torch.device) -> str | None:
    """Compare values and gradients of all inputs with the reference in fp64, with odd sizes and ignored labels."""
    from kernels.cross_entropy.reference import REFERENCE

    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(23, 16), (41, 16)] + ([(41,)] if query.bias else [])
    inputs = [torch.randn(shape, generator=generator).to(device, query.dtype) for shape in shapes]
    labels = torch.randint(0, 41, (23,), generator=generator).to(device)
    labels[::5] = query.form.ignore_index

    def outcome(which: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        bias = leaves[2] if query.bias else None
        found = which.run(leaves[0], leaves[1], labels, query.form, bias=bias)
        grads = torch.autograd.grad(found.total, leaves, torch.tensor(0.5, device=device, dtype=found.total.dtype))
        return [found.total.detach(), found.nll, found.lse, *grads]

    tolerance = CROSS_ENTROPY.tolerances[query.dtype]
    names = ("total", "loss per token", "log-sum-exp", "gradient of hidden", "gradient of weight", "gradient of bias")
    for name, a, b in zip(names, outcome(impl, query.dtype), outcome(REFERENCE, torch.float64)):
        fault = tolerance.fault(name, a, b)
        if fault is not None:
            return fault
    return None


CROSS_ENTROPY = register_op(
    OpSpec(
        "cross_entropy",
        tolerances={
            torch.float64: Tolerance(1e-5, 1e-5),
            torch.float32: Tolerance(1e-4, 1e-4),
            torch.float16: Tolerance(5e-2, 2e-2),
            torch.bfloat16: Tolerance(3e-2, 5e-2),
        },
        check=check_cross_entropy,
    )
)
