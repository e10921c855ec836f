"""RMSNorm through torch.nn.functional.rms_norm: one kernel on CUDA, fused with its neighbours where it is compiled."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm.spec import RMS_NORM, RMSNormQuery


class TorchRMSNorm:
    """torch's own."""

    name = "torch"
    kind = "torch"

    def priority(self, query: RMSNormQuery) -> int:
        return 50

    def supports(self, query: RMSNormQuery) -> Literal[True] | str:
        return True

    def run(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """y [..., D]."""
        if weight is not None and weight.dtype != x.dtype:
            weight = weight.to(x.dtype)  # the fused kernels take one dtype only
        return F.rms_norm(x, (x.shape[-1],), weight, eps)


TORCH = RMS_NORM.add(TorchRMSNorm())
