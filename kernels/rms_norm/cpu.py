"""RMSNorm for eager code on a CPU, where torch's own is a chain of separate operations: fewer passes over memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.rms_norm.spec import RMS_NORM, RMSNormQuery
from kernels.rms_norm.torch_native import TORCH

FEW = 1 << 14
"""Elements up to which torch's own forward is faster in fp32, as calls cost more than the work."""


class CpuRMSNorm:
    """fp32 and fp64; forward 3 passes, backward 6."""

    name = "cpu"
    kind = "torch"

    def priority(self, query: RMSNormQuery) -> int:
        return 60

    def supports(self, query: RMSNormQuery) -> Literal[True] | str:
        if query.device != "cpu":
            return f"it is made for CPUs, not {query.device}"
        if query.dtype not in (torch.float32, torch.float64):
            return f"it takes fp32 and fp64, not {query.dtype}"
        return True

    def run(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """y [..., D]."""
        if _few(x) and not torch.is_grad_enabled():
            return TORCH.run(x, weight, eps)
        return _RMSNorm.apply(x, weight, eps)


def _few(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() <= FEW


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])
        inverse = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, inverse, weight)
        if _few(x):  # to the bit as without gradients
            return TORCH.run(x, weight, eps)
        out = rows * inverse
        if weight is not None:
            out.mul_(weight)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, inverse, weight = ctx.saved_tensors
        width = rows.shape[-1]
        grads = grad.reshape(-1, width)
        normed = rows * inverse
        product = normed * grads
        d_weight = None if weight is None or not ctx.needs_input_grad[1] else product.sum(0).to(weight.dtype)
        dot = product.sum(-1) if weight is None else torch.mv(product, weight.to(product.dtype))
        # dx = inverse * (grad * weight - normed * mean(normed * grad * weight)), written over `product`
        d_rows = torch.mul(normed, dot.div_(-width).unsqueeze(-1), out=product)
        d_rows = d_rows.add_(grads) if weight is None else d_rows.addcmul_(grads, weight.to(grads.dtype))
        return d_rows.mul_(inverse).view(grad.shape), d_weight, None


CPU = RMS_NORM.add(CpuRMSNorm())
