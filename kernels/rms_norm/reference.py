"""RMSNorm written out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.rms_norm.spec import RMS_NORM, RMSNormQuery


class ReferenceRMSNorm:
    """In fp32, or fp64 for fp64 inputs."""

    name = "reference"
    kind = "reference"

    def priority(self, query: RMSNormQuery) -> int:
        return 0

    def supports(self, query: RMSNormQuery) -> Literal[True] | str:
        return True

    def run(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """y [..., D]."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed if weight is None else normed * weight.to(wide.dtype)).to(x.dtype)


REFERENCE = RMS_NORM.add(ReferenceRMSNorm())
