"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.rms_norm import cpu, reference, torch_native  # noqa: F401
from kernels.rms_norm.spec import RMS_NORM, RMSNormQuery

__all__ = ["RMS_NORM", "RMSNormQuery", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y [..., D] in the dtype of x; weight [D] or None. Compiled code gets torch's own, which the compiler fuses."""
    if torch.compiler.is_compiling():
        return torch_native.TORCH.run(x, weight, eps)
    query = RMSNormQuery(x.device.type, x.dtype, weight is not None)
    return dispatch.resolve("rms_norm", query).run(x, weight, eps)
