"""Normalisations over the last dimension: RMSNorm and LayerNorm, with or without an affine part."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.rms_norm import RMSNormQuery, rms_norm
from llm.blocks.base import NORMS, NormConfig
from llm.core.cost import Cost
from llm.core.errors import UserError
from llm.core.init import Init, constant
from llm.core.registry import About


@NORMS.register(
    "rms_norm",
    tiny=lambda: RMSNormConfig(),
    paper="Zhang and Sennrich 2019",
    tinies={"plain": lambda: RMSNormConfig(affine=False)},
    about=About(
        equation="y = w ⊙ x / sqrt(mean(x²) + eps)",
        use="The usual choice of today.",
        weakness="It does not centre, so a large common offset stays in.",
    ),
)
class RMSNormConfig(NormConfig):
    """x / sqrt(mean(x^2) + eps), times a weight when affine."""

    eps: float = Field(1e-5, gt=0)
    affine: bool = True

    def build(self, dim: int) -> RMSNorm:
        return RMSNorm(dim, self)

    def cost(self, dim: int) -> Cost:
        return Cost(params=dim * self.affine, active_params=dim * self.affine)


class RMSNorm(nn.Module):
    """weight [dim] when affine."""

    def __init__(self, dim: int, config: RMSNormConfig) -> None:
        super().__init__()
        self.dim = dim
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(dim)) if config.affine else None

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def kernel_requests(self, device: torch.device, dtype: torch.dtype) -> list[tuple[str, RMSNormQuery]]:
        """What the self-test of kernels must cover."""
        return [
            ("rms_norm", RMSNormQuery(device.type, kind, self.weight is not None)) for kind in {dtype, torch.float32}
        ]

    def init_spec(self) -> dict[str, Init]:
        return {"weight": constant(1.0)}


@NORMS.register(
    "layer_norm",
    tiny=lambda: LayerNormConfig(),
    paper="Ba et al. 2016",
    tinies={
        "plain": lambda: LayerNormConfig(affine=False, bias=False),
        "unbiased": lambda: LayerNormConfig(bias=False),
    },
    about=About(
        equation="y = w ⊙ (x − mean(x)) / sqrt(var(x) + eps) + b",
        use="GPT-2, Pythia, and papers which were tuned with it.",
        weakness="Slower than RMSNorm by one reduction.",
    ),
)
class LayerNormConfig(NormConfig):
    """(x - mean) / sqrt(var + eps), times a weight plus a bias when affine."""

    eps: float = Field(1e-5, gt=0)
    affine: bool = True
    bias: bool = True

    @model_validator(mode="before")
    @classmethod
    def _bias_goes_with_the_weight(cls, value: Any) -> Any:
        return {"bias": False} | value if isinstance(value, dict) and value.get("affine") is False else value

    @model_validator(mode="after")
    def _no_dead_keys(self) -> LayerNormConfig:
        if not self.affine and self.bias:
            raise UserError("layer_norm: bias has no effect with affine: false; remove it or set affine: true")
        return self

    def build(self, dim: int) -> LayerNorm:
        return LayerNorm(dim, self)

    def cost(self, dim: int) -> Cost:
        params = dim * (self.affine + (self.affine and self.bias))
        return Cost(params=params, active_params=params)


class LayerNorm(nn.Module):
    """weight [dim] when affine, bias [dim] when affine with a bias."""

    def __init__(self, dim: int, config: LayerNormConfig) -> None:
        super().__init__()
        self.dim = dim
        self.eps = config.eps
        self.weight = nn.Parameter(torch.empty(dim)) if config.affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if config.affine and config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        # The kernels take parameters that are wider than the input, but not narrower ones.
        weight, bias = (
            p if p is None or p.dtype.itemsize >= x.dtype.itemsize else p.to(x.dtype) for p in (self.weight, self.bias)
        )
        return F.layer_norm(x, (self.dim,), weight, bias, self.eps).to(x.dtype)

    def init_spec(self) -> dict[str, Init]:
        return {"weight": constant(1.0), "bias": constant(0.0)}
