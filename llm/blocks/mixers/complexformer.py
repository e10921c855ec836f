"""Attention whose queries and keys are complex vectors in polar form, with a learned map of their phases per head.

The score of query m and key n is sum_i |q_i| |k_i| cos(slope_i (phase of q_i - phase of k_i) + offset_i + (m - n) g_i),
g_i the rates of rotary positions. It separates into a map of q and one of k, so that any attention backend and an
ordinary cache of keys serve it: a complex channel is a pair of reals throughout.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llm.blocks.base import MIXERS, BuildCtx
from llm.blocks.mixers.attention import Attention, AttentionConfig
from llm.blocks.norms import RMSNormConfig
from llm.blocks.rope import Rope
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant, normal
from llm.core.registry import About


@MIXERS.register(
    "complexformer",
    tiny=lambda: ComplexFormerConfig(n_heads=2),
    paper="arXiv:2505.10222 (withdrawn by its first author)",
    status="experimental",
    tinies={
        "gqa": lambda: ComplexFormerConfig(n_heads=4, n_kv_heads=2, slope_init="normal", bias=True),
        "euler": lambda: ComplexFormerConfig(n_heads=2, adapt="layer", slope_init="zero", qk_norm=RMSNormConfig()),
        "bounded": lambda: ComplexFormerConfig(n_heads=2, max_deviation=0.2, window=5, n_sinks=1),
    },
    about=About(
        equation="score = Σ_i |q_i| |k_i| cos(δ_i (∠q_i − ∠k_i) + b_i + (m − n) g_i), δ and b learned per head",
        use="A question about rotary attention, which is its case δ = 1, b = 0: d_model more parameters per layer.",
        weakness="Scores jump where a phase crosses π unless δ is whole; the paper was withdrawn.",
    ),
)
class ComplexFormerConfig(AttentionConfig):
    """Softmax attention with a slope and an offset on the phase difference of each channel pair.

    adapt: a slope per key-value head and pair and an offset per query head and pair, or one of each for the layer
    (EulerFormer). slope_init: one starts as rotary attention; normal draws from N(0, 1 / sqrt(pairs)), as the authors'
    code; zero starts with scores that ignore phases. max_deviation: slopes are kept within 1 +- this.
    Pairs are those of the rotary positions of the model; channels that these do not turn, and all channels under other
    position encodings, are paired as first and second half. scale: 1.0 for the authors' unscaled scores.
    """

    adapt: Literal["head", "layer"] = "head"
    slope_init: Literal["one", "normal", "zero"] = "one"
    max_deviation: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _starts_inside(self) -> ComplexFormerConfig:
        if self.max_deviation is not None and self.slope_init != "one":
            raise UserError(
                f"complexformer: max_deviation keeps slopes near 1, slope_init {self.slope_init!r} starts them "
                "elsewhere; set slope_init: one or remove max_deviation"
            )
        return self

    def n_adapted(self, d_model: int) -> tuple[int, int]:
        """(slopes, offsets)."""
        n_heads, n_kv_heads, d_head = self.resolved(d_model)
        return (1, 1) if self.adapt == "layer" else (n_kv_heads * (d_head // 2), n_heads * (d_head // 2))

    def build(self, ctx: BuildCtx) -> ComplexFormer:
        return ComplexFormer(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        learned = sum(self.n_adapted(dims.d_model))
        return super().cost(dims, seq_len, mode) + Cost(params=learned, active_params=learned)


class ComplexFormer(Attention):
    """As Attention, with `phase` between the projections and the positions."""

    def __init__(self, config: ComplexFormerConfig, ctx: BuildCtx) -> None:
        super().__init__(config, ctx)
        self.phase = PhaseMap(config, ctx.d_model, Pairing.of(self.position, self.d_head))

    def before_positions(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.phase(*super().before_positions(q, k))


class PhaseMap(nn.Module):
    """slope [Hkv * pairs] and offset [H * pairs], or [1] each; vectors, so that no optimizer takes them for matrices
    nor decays them."""

    def __init__(self, config: ComplexFormerConfig, d_model: int, pairing: Pairing) -> None:
        super().__init__()
        n_slopes, n_offsets = config.n_adapted(d_model)
        self.n_pairs = config.resolved(d_model)[2] // 2
        self.start = config.slope_init
        self.max_deviation = config.max_deviation
        self.pairing = pairing
        self.slope = nn.Parameter(torch.empty(n_slopes))
        self.offset = nn.Parameter(torch.empty(n_offsets))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, Dh] and keys [B, T, Hkv, Dh] with their phases mapped."""
        slope: Tensor = self.slope
        offset: Tensor = self.offset
        if self.max_deviation is not None:
            slope = slope.clamp(1.0 - self.max_deviation, 1.0 + self.max_deviation)
        query_slope = slope
        if slope.numel() > 1:
            slope, offset = slope.unflatten(0, (-1, self.n_pairs)), offset.unflatten(0, (-1, self.n_pairs))
            query_slope = slope.repeat_interleave(q.shape[2] // k.shape[2], dim=0)
        return _MapPhase.apply(q, query_slope, offset, self.pairing), _MapPhase.apply(k, slope, None, self.pairing)

    def init_spec(self) -> dict[str, Init]:
        starts = {"one": constant(1.0), "zero": constant(0.0), "normal": normal(self.n_pairs**-0.5)}
        return {"slope": starts[self.start], "offset": constant(0.0)}


class Pairing:
    """Which channels of a head are the real and imaginary parts: among the first `width` as rotary positions pair
    them, among the others the first half with the second."""

    def __init__(self, width: int, interleaved: bool) -> None:
        self.width = width
        self.interleaved = interleaved

    @staticmethod
    def of(position: nn.Module, d_head: int) -> Pairing:
        """That of a model's position encoding; UserError for a head of odd width."""
        if d_head % 2:
            raise UserError(f"complexformer pairs the channels of a head, so d_head must be even, not {d_head}")
        if isinstance(position, Rope):
            return Pairing(position.width, position.config.interleaved)
        return Pairing(d_head, False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., Dh] -> real and imaginary parts [..., Dh / 2]."""
        turning, rest = x[..., : self.width], x[..., self.width :]
        real, imaginary = turning.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else turning.chunk(2, dim=-1)
        if not rest.shape[-1]:
            return real, imaginary
        more_real, more_imaginary = rest.chunk(2, dim=-1)
        return torch.cat([real, more_real], dim=-1), torch.cat([imaginary, more_imaginary], dim=-1)

    def join(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """The inverse of `split`."""
        n = self.width // 2
        turning = torch.stack([real[..., :n], imaginary[..., :n]], dim=-1 if self.interleaved else -2).flatten(-2)
        if n == real.shape[-1]:
            return turning
        return torch.cat([turning, real[..., n:], imaginary[..., n:]], dim=-1)


class _MapPhase(torch.autograd.Function):
    """z = |z| e^{i phase} becomes |z| e^{i (slope * phase + offset)}, computed in at least fp32.

    No gradient is divided by a magnitude: that of the phase is multiplied by it first, which bounds it. At z = 0, where
    the map has no derivative, it is the one along phase 0, which for slope 1 is that of the identity.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, slope: Tensor, offset: Tensor | None, pairing: Pairing
    ) -> Tensor:
        ctx.save_for_backward(x, slope, offset)
        ctx.pairing = pairing
        real, imaginary = pairing.split(x.to(torch.promote_types(x.dtype, torch.float32)))
        angle = _angle(torch.atan2(imaginary, real), slope, offset)
        magnitude = torch.hypot(real, imaginary)
        return pairing.join(magnitude * angle.cos(), magnitude * angle.sin()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, slope, offset = ctx.saved_tensors
        real, imaginary = ctx.pairing.split(x.to(torch.promote_types(x.dtype, torch.float32)))
        phase, magnitude = torch.atan2(imaginary, real), torch.hypot(real, imaginary)
        angle = _angle(phase, slope, offset)
        g_real, g_imaginary = ctx.pairing.split(grad.to(magnitude.dtype))
        cos, sin = angle.cos(), angle.sin()
        radial = g_real * cos + g_imaginary * sin
        tangential = g_imaginary * cos - g_real * sin
        turned = slope.to(magnitude.dtype) * tangential
        cos = torch.where(magnitude == 0, 1.0, real / magnitude)
        sin = torch.where(magnitude == 0, 0.0, imaginary / magnitude)
        g_x = ctx.pairing.join(radial * cos - turned * sin, radial * sin + turned * cos).to(x.dtype)
        g_angle = magnitude * tangential
        g_slope = (g_angle * phase).sum_to_size(slope.shape).to(slope.dtype)
        g_offset = None if offset is None else g_angle.sum_to_size(offset.shape).to(offset.dtype)
        return g_x, g_slope, g_offset, None


def _angle(phase: Tensor, slope: Tensor, offset: Tensor | None) -> Tensor:
    """The mapped phase [B, T, H, pairs]."""
    angle = slope.to(phase.dtype) * phase
    return angle if offset is None else angle + offset.to(phase.dtype)
