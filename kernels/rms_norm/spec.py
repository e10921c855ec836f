"""RMSNorm: the operation and how an implementation is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import OpSpec, Tolerance, register_op


@dataclass(frozen=True)
class RMSNormQuery:
    """x of `dtype` on `device`, with a weight or without."""

    device: str
    dtype: torch.dtype
    affine: bool


def check_rms_norm(impl: Any, query: RMSNormQuery, device: torch.device) -> str | None:
    """Compare outputs and gradients with the reference in fp64, on an odd width and a non-contiguous input."""
    from kernels.rms_norm.reference import REFERENCE

    generator = torch.Generator().manual_seed(0)
    full = torch.randn(3, 37, 5, generator=generator).to(device, query.dtype)
    weight = torch.randn(37, generator=generator).to(device, query.dtype) if query.affine else None
    upstream = torch.randn(3, 5, 37, generator=generator).to(device, query.dtype)

    def outcome(which: Any, dtype: torch.dtype) -> list[Tensor]:
        x = full.to(dtype).requires_grad_()
        w = None if weight is None else weight.to(dtype).requires_grad_()
        out = which.run(x.transpose(1, 2), w, 1e-5)
        return [out.detach(), *torch.autograd.grad(out, [x] if w is None else [x, w], upstream.to(dtype))]

    tolerance = RMS_NORM.tolerances[query.dtype]
    names = ("output", "gradient of x", "gradient of weight")
    for name, a, b in zip(names, outcome(impl, query.dtype), outcome(REFERENCE, torch.float64)):
        fault = tolerance.fault(name, a, b)
        if fault is not None:
            return fault
    return None


RMS_NORM = register_op(
    OpSpec(
        "rms_norm",
        tolerances={
            torch.float64: Tolerance(1e-10, 1e-8),
            torch.float32: Tolerance(1e-5, 1e-5),
            torch.float16: Tolerance(1e-2, 1e-2),
            torch.bfloat16: Tolerance(6e-2, 3e-2),
        },
        check=check_rms_norm,
    )
)
