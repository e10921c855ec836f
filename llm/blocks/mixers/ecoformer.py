"""EcoFormer in a causal form: queries and keys become binary codes by kernel hash functions, and attention is linear
attention over the codes, mostly additions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from llm.blocks.base import MIXERS, BuildCtx, MixerConfig, TokenMixer
from llm.blocks.feature_attention import Factors, FeatureAttention, feature_cost, head_width, to_heads
from llm.blocks.kernel_hashing import (
    HashFit,
    fit_hash_functions,
    rbf_features,
    sign_codes,
    similarity_targets,
    squared_distances,
    unit_vectors,
)
from llm.blocks.linears.dense import project
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant, normal
from llm.core.progress import Progress
from llm.core.registry import About
from llm.core.seq import SeqInfo

CENTRE = 0.6065
"""What a feature is on average for vectors in random directions, exp(-1/2). Features are held less this, so that a
model in bf16, whose means are rounded, still centres them precisely."""
RATE = 0.1
"""Rate at which bandwidths and means follow those of each calibration step."""


@MIXERS.register(
    "ecoformer",
    tiny=lambda: EcoFormerConfig(n_heads=2, d_head=4),
    paper="arXiv:2209.09004",
    status="experimental",
    tinies={
        "official": lambda: EcoFormerConfig(
            n_heads=2, d_head=12, n_anchors=9, beta=32.0, numerator="official", bias=False
        )
    },
    exempt={
        "gradients": "The sign has no derivative but zero: training passes a straight-through gradient to the queries "
        "and keys, which finite differences cannot find."
    },
    about=About(
        equation="o_t = Σ_{s ≤ t} (h_t · h_s + β) v_s / Σ_{s ≤ t} (h_t · h_s + β), h = sign(A (rbf(u) − mean))",
        use="Where multiplications cost: codes are ±1, so products with them are additions.",
        weakness="Published for images. Codes of 16 bits and the offset β make attention nearly uniform, so recall is "
        "weak; the energy figure leaves memory traffic out, and a GPU gains nothing.",
    ),
)
class EcoFormerConfig(MixerConfig):
    """Linear attention over binary codes of n_bits per head, made from the radial basis features of n_anchors.

    Queries and keys share one projection. beta: added to the products of codes; None for n_bits + 1. numerator: exact
    gives weights that sum to 1; official follows the published code, which adds beta times the token's own value alone.
    calibration_steps: optimizer steps in which the bandwidths and the means of the features follow the batches; then
    they stand still, as a causal model needs. Anchors and hash functions are random until `fit_hashing` sets them.
    """

    n_heads: int = Field(ge=1)
    d_head: int | None = Field(None, ge=1)
    n_bits: int = Field(16, ge=1)
    n_anchors: int = Field(25, ge=1)
    beta: float | None = Field(None, gt=0)
    numerator: Literal["exact", "official"] = "exact"
    calibration_steps: int = Field(100, ge=0)
    bias: bool = True

    @model_validator(mode="after")
    def _weights_stay_positive(self) -> EcoFormerConfig:
        if self.beta is not None and self.beta < self.n_bits:
            raise UserError(
                f"ecoformer: beta {self.beta:g} is less than n_bits {self.n_bits}, so that weights could be negative; "
                f"set beta to {self.n_bits} or more, or remove it"
            )
        return self

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return EcoFormer(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d_head = head_width(self.type, dims.d_model, self.n_heads, self.d_head)
        inner = self.n_heads * d_head
        cost = sum((dims.linear(dims.d_model, inner, role=f"mixer.{r}", bias=self.bias) for r in "qv"), Cost())
        cost = cost + dims.linear(inner, dims.d_model, role="mixer.out", bias=self.bias)
        codes = 2.0 * self.n_heads * self.n_anchors * (d_head + self.n_bits)
        sums = feature_cost(self.n_heads, self.n_bits + 1, d_head, seq_len, mode, dims.state_dtype_bytes)
        return cost + sums + Cost(flops_per_token=codes)


class EcoFormer(FeatureAttention):
    """qk, v [D -> H * d], out [H * d -> D].

    Buffers: anchors [H, M, d], functions [H, b, M], mean [H, M] and sigma [H] of the features, fitted [1]; sums
    [H, M + 1] and count [1] gather the features and mean distances of one optimizer step's tokens.
    """

    anchors: Tensor
    functions: Tensor
    mean: Tensor
    sigma: Tensor
    fitted: Tensor
    sums: Tensor
    count: Tensor
    eps = 0.0

    def __init__(self, config: EcoFormerConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.config = config
        self.collects = False
        self.n_heads = config.n_heads
        self.d_head = head_width(config.type, ctx.d_model, config.n_heads, config.d_head)
        self.d_feature = config.n_bits + 1
        self.beta = config.beta if config.beta is not None else config.n_bits + 1.0
        inner = self.n_heads * self.d_head
        self.qk = ctx.linear(ctx.d_model, inner, role="mixer.q", bias=config.bias)
        self.v = ctx.linear(ctx.d_model, inner, role="mixer.v", bias=config.bias)
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out", bias=config.bias)
        heads, bits, anchors = self.n_heads, config.n_bits, config.n_anchors
        self.register_buffer("anchors", torch.empty(heads, anchors, self.d_head))
        self.register_buffer("functions", torch.empty(heads, bits, anchors))
        self.register_buffer("mean", torch.empty(heads, anchors))
        self.register_buffer("sigma", torch.empty(heads))
        self.register_buffer("fitted", torch.empty(1))
        self.register_buffer("sums", torch.empty(heads, anchors + 1), persistent=False)
        self.register_buffer("count", torch.empty(1), persistent=False)

    def features(self, x: Tensor, seq: SeqInfo) -> Factors:
        u, v = (to_heads(y, self.d_head) for y in project(x, self.qk, self.v))
        with torch.autocast(x.device.type, enabled=False):
            codes = self.codes(u)
        offset = self.beta if self.config.numerator == "exact" else 0.0
        return {"q": F.pad(codes, (0, 1), value=offset), "k": F.pad(codes, (0, 1), value=1.0), "v": v}

    def codes(self, u: Tensor) -> Tensor:
        """[B, T, H, b] of +1 and -1 for u [B, T, H, d]."""
        distances = squared_distances(normalised(u), self.anchors.to(u.dtype))
        rbf = rbf_features(distances, self.sigma.to(u.dtype)) - CENTRE
        if self.training:
            with torch.no_grad():
                seen = torch.cat([rbf.detach(), distances.detach().mean(-1, keepdim=True)], dim=-1)
                self.sums += seen.flatten(0, 1).sum(0).to(self.sums.dtype)
                self.count += u.shape[0] * u.shape[1]
        centred = rbf - self.mean.to(u.dtype)
        return sign_codes(torch.einsum("bthm,hrm->bthr", centred, self.functions.to(u.dtype)))

    def finish(self, sums: Tensor, factors: Factors, seq: SeqInfo) -> Tensor:
        if self.config.numerator == "exact":
            return super().finish(sums, factors, seq)
        seen = self.beta * (seq.positions + 1)[..., None, None].to(sums.dtype)
        return (sums[..., :-1] + self.beta * factors["v"]) / (sums[..., -1:] + seen)

    @torch.no_grad()
    def before_step(self, progress: Progress) -> None:
        """Collect in the calibration steps, unless the hash functions are fitted."""
        self.collects = progress.step < self.config.calibration_steps and not bool(self.fitted)
        self.sums.zero_()
        self.count.zero_()

    @torch.no_grad()
    def after_step(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Let means and bandwidths follow those of the step's tokens over all ranks."""
        if not self.collects:
            return
        seen = torch.cat([self.sums.flatten(), self.count])
        seen = all_reduce(seen) if all_reduce is not None else seen
        found = (seen[:-1] / seen[-1].clamp(min=1)).view_as(self.sums)
        self.mean.lerp_(found[:, :-1], RATE)
        self.sigma.lerp_(found[:, -1], RATE)

    @torch.no_grad()
    def fit_hashing(
        self, x: Tensor, *, n_pairs: int = 10, lr: float = 5e-4, iterations: int = 100, seed: int = 0
    ) -> HashFit:
        """Set anchors, bandwidths, means and hash functions from inputs x [B, T, D] of this mixer, as the paper does
        with the first batch: anchors are tokens of the first row, and functions are fitted to the similarities of
        tokens. All ranks of a run must do so with the same x, or load a checkpoint that holds the result."""
        generator = torch.Generator().manual_seed(seed)
        config = self.config
        if x.shape[1] < config.n_anchors:
            raise UserError(
                f"ecoformer: {x.shape[1]} tokens are too few for {config.n_anchors} anchors; give rows of at least as "
                "many tokens, or set a smaller n_anchors"
            )
        u = normalised(to_heads(self.qk(x), self.d_head))
        chosen = torch.randperm(x.shape[1], generator=generator)[: config.n_anchors]
        self.anchors.copy_(u[0, chosen.to(u.device)].transpose(0, 1))
        distances = squared_distances(u, self.anchors.to(u.dtype))
        self.sigma.copy_(distances.mean((0, 1, 3)))
        rbf = rbf_features(distances, self.sigma.to(u.dtype)) - CENTRE
        self.mean.copy_(rbf.mean((0, 1)))
        fit = fit_hash_functions(
            rbf - self.mean.to(u.dtype), similarity_targets(u, n_pairs), config.n_bits,
            lr=lr, iterations=iterations, generator=generator,
        )  # fmt: skip
        self.functions.copy_(fit.functions)
        self.fitted.fill_(1.0)
        return fit

    def init_spec(self) -> dict[str, Init]:
        # Unit vectors in random directions have squared distances of 2 on average.
        start = {"mean": 0.0, "sigma": 2.0, "fitted": 0.0, "sums": 0.0, "count": 0.0}
        spec: dict[str, Init] = {name: constant(value) for name, value in start.items()}
        return {**spec, "anchors": unit_vectors, "functions": normal(1.0)}


def normalised(u: Tensor) -> Tensor:
    """u / |u| over the last dimension; zeros stay zeros."""
    return u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-12)
