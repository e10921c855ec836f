"""Pattention (Wang et al. 2024, TokenFormer): where a matrix stood, the input attends over learnable parameter tokens.

Capacity is the number n of these tokens, apart from the widths, so a trained layer can be given more of them
(`llm/models/growth.py`). The scale tau of the scores is stored with the layer as tau^2, which is n at first: tokens
with zero keys change no output as long as it stays.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llm.blocks.base import LINEARS, InitConfig, LinearConfig, linear_init
from llm.core.cost import Cost
from llm.core.init import Init, computed, constant
from llm.core.registry import About

Normalization = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
Approximate = Literal["none", "tanh"]

EPS = 1e-5
"""Added to the norm of the scores, so that an input of zeros gives zeros."""


@LINEARS.register(
    "pattention",
    tiny=lambda: PattentionConfig(n_tokens=12),
    paper="arXiv:2410.23168",
    status="experimental",
    about=About(
        equation="y = GELU(τ a / ‖a‖₂) V, a = x Kᵀ over n parameter tokens (K, V), τ = √n when first built",
        use="Models that are to grow: more parameter tokens with zero keys leave every output as it is, and the decode "
        "state does not depend on n.",
        weakness="Two products of n tokens instead of one: at equal parameters as many FLOPs, but the scores of all n "
        "tokens are held for the backward pass.",
    ),
)
class PattentionConfig(LinearConfig):
    """Two matrices, keys [n_tokens, d_in] and values [n_tokens, d_out], with normalised scores between.

    n_tokens: None for d_in, as in the published models; 3/4 of that makes a transformer block as large as usual.
    normalization: l2_norm_gelu, the published one; gelu_l2_norm, GELU before the norm; softmax, tau^2 times it.
    approximate: tanh takes the tanh form of GELU. tau2: the stored square of the scale; None for n_tokens.
    key_std, value_std: initial standard deviations. None: 1 / sqrt(d_in) for keys, which gives scores of about 1; for
    values what makes outputs as large as a dense layer's (published: 0.02, and 2 / (layers * sqrt(d_model))). Only the
    direction of all keys together matters, so a smaller key_std makes their updates relatively larger.
    """

    n_tokens: int | None = Field(None, ge=1)
    normalization: Normalization = "l2_norm_gelu"
    approximate: Approximate = "none"
    tau2: int | None = Field(None, ge=1)
    key_std: float | None = Field(None, gt=0)
    value_std: float | None = Field(None, ge=0)

    def width(self, d_in: int) -> int:
        """Parameter tokens for an input of width d_in."""
        return self.n_tokens or d_in

    def init_key_std(self, d_in: int) -> float:
        """Initial standard deviation of keys."""
        return self.key_std if self.key_std is not None else d_in**-0.5

    def init_value_std(self, d_in: int, std: float) -> float:
        """Initial standard deviation of values: outputs are as large as those of a dense layer of `std`."""
        if self.value_std is not None:
            return self.value_std
        n = self.width(d_in)
        tau2 = self.tau2 or n
        if self.normalization == "l2_norm_gelu":
            squares = n * mean_square_gelu(tau2 / n)
        elif self.normalization == "gelu_l2_norm":
            squares = float(tau2)
        else:
            squares = tau2**2 * min(1.0, math.exp(min(50.0, self.init_key_std(d_in) ** 2 * d_in)) / n)
        return std * math.sqrt(d_in / squares)

    def build(self, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig) -> Pattention:
        return Pattention(self, d_in, d_out, bias=bias, std=std, init=init)

    def cost(self, d_in: int, d_out: int, *, bias: bool) -> Cost:
        weights = self.width(d_in) * (d_in + d_out)
        params = weights + (d_out if bias else 0)
        return Cost(params=params, active_params=params, flops_per_token=2.0 * weights)


class Pattention(nn.Module):
    """keys [n, d_in], values [n, d_out], bias [d_out] or None; tau2, an integer: the square of the scale."""

    tau2: Tensor

    def __init__(
        self, config: PattentionConfig, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig
    ) -> None:
        super().__init__()
        n = config.width(d_in)
        self.normalization: Normalization = config.normalization
        self.approximate: Approximate = config.approximate
        self.keys = nn.Parameter(torch.empty(n, d_in))
        self.values = nn.Parameter(torch.empty(n, d_out))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        first_tau2 = config.tau2 or n
        self.register_buffer("tau2", torch.tensor(first_tau2, dtype=torch.int64))
        self._init = {
            "keys": linear_init(config.init_key_std(d_in), init),
            "values": linear_init(config.init_value_std(d_in, std), init),
            "bias": constant(0.0),
            "tau2": computed(lambda: torch.tensor(first_tau2, dtype=torch.int64)),
        }

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.keys)
        weights = token_weights(scores, self.tau2, self.normalization, self.approximate)
        return F.linear(weights.to(scores.dtype), self.values.t(), self.bias)

    def init_spec(self) -> dict[str, Init]:
        return dict(self._init)


def token_weights(
    scores: Tensor,
    tau2: Tensor,
    normalization: Normalization = "l2_norm_gelu",
    approximate: Approximate = "none",
    *,
    norm: Tensor | None = None,
) -> Tensor:
    """Weights of parameter tokens [..., n] for scores [..., n], in at least fp32: norms of thousands of half-precision
    scores need it.

    norm [..., 1]: the `score_norm` of all tokens, where `scores` are those of a share of them.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if normalization == "softmax":
        assert norm is None, "a share of a softmax needs more than a norm"
        return tau2 * wide.softmax(-1)
    if norm is None:
        norm = score_norm(scores, normalization, approximate)
    scale = tau2.to(wide.dtype).sqrt() / (norm + EPS)
    if normalization == "gelu_l2_norm":
        return F.gelu(wide, approximate=approximate) * scale
    return F.gelu(wide * scale, approximate=approximate)


def score_norm(scores: Tensor, normalization: Normalization, approximate: Approximate = "none") -> Tensor:
    """[..., 1]: what an L2 normalisation divides scores [..., n] by; over shares of the tokens, squares add up."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if normalization == "gelu_l2_norm":
        wide = F.gelu(wide, approximate=approximate)
    return torch.linalg.vector_norm(wide, dim=-1, keepdim=True)


@functools.cache
def mean_square_gelu(variance: float) -> float:
    """Mean of GELU(z)^2 for normal z of a variance."""
    step = 1e-3
    total = 0.0
    for i in range(-10_000, 10_000):
        u = step * (i + 0.5)
        z = u * math.sqrt(variance)
        total += (0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0)))) ** 2 * math.exp(-0.5 * u * u)
    return total * step / math.sqrt(2.0 * math.pi)
