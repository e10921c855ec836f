"""Rotary position embedding (Su et al. 2021) and the ways to stretch it to longer contexts."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llm.blocks.base import POSITIONS, BuildCtx, PositionConfig, PositionEncoding
from llm.config.base import Config
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo

_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "dynamic_ntk": ("original_max_seq_len",),
    "yarn": ("original_max_seq_len", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
}


class RopeScaling(Config):
    """How rotation rates change so that a model trained on short sequences reads long ones. All are static: a rate
    never depends on how long the sequence is now, hence prefill and steps agree.

    linear: rates / factor (Chen et al. 2023). ntk: theta * factor^(d / (d-2)) (bloc97 2023). dynamic_ntk: the same for
    the growth that model.max_seq_len is over original_max_seq_len (what others compute when a sequence has reached
    that length). yarn: high rates kept, low ones divided by factor, a ramp between beta_fast and beta_slow turns over
    original_max_seq_len; cos and sin times attention_factor, by default 0.1 ln(factor) + 1 (Peng et al. 2023). llama3:
    high rates kept, low ones divided, a smooth ramp between two wavelengths (Llama 3.1).
    """

    type: Literal["linear", "ntk", "dynamic_ntk", "yarn", "llama3"]
    factor: float = Field(ge=1)
    original_max_seq_len: int | None = Field(None, ge=1)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    attention_factor: float | None = Field(None, gt=0)
    truncate: bool = True
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _used_keys(self) -> RopeScaling:
        allowed = ("type", "factor", *_FIELDS[self.type])
        fields = type(self).model_fields
        ignored = [name for name in fields if name not in allowed and getattr(self, name) != fields[name].default]
        if ignored:
            raise UserError(
                f"rope scaling {self.type!r} does not use {ignored[0]} (it uses: {', '.join(allowed[1:])}); remove it"
            )
        if "original_max_seq_len" in allowed and self.original_max_seq_len is None:
            raise UserError(
                f"rope scaling {self.type!r} needs original_max_seq_len, the length that the model was trained on"
            )
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError("rope scaling 'llama3' needs high_freq_factor above low_freq_factor")
        return self


@POSITIONS.register(
    "rope",
    tiny=lambda: RopeConfig(),
    paper="Su et al. 2021 (RoFormer)",
    tinies={
        "interleaved": lambda: RopeConfig(interleaved=True),
        "partial": lambda: RopeConfig(fraction=0.5),
        "yarn": lambda: RopeConfig(scaling=RopeScaling(type="yarn", factor=4.0, original_max_seq_len=8)),
    },
    about=About(
        equation="q_t, k_t rotated by t θ^(−2i/d) in each plane i, so scores depend on distances",
        use="The usual choice for attention; scalings (linear, NTK, YaRN, Llama 3) lengthen the context.",
        weakness="Unscaled, it fails beyond the trained length.",
    ),
)
class RopeConfig(PositionConfig):
    """Channel pair i of a head turns by position * theta^(-2i/d).

    interleaved: pairs are neighbouring channels (2i, 2i+1); otherwise channels i and i + d/2, as Llama and GPT-NeoX
    weights want it. fraction: only this part of each head turns, the first channels (GPT-NeoX: 0.25).
    """

    theta: float = Field(10000.0, gt=1)
    fraction: float = Field(1.0, gt=0, le=1)
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def build(self, ctx: BuildCtx) -> Rope:
        return Rope(self, ctx.max_seq_len)


def rope_rates(
    config: RopeConfig, width: int, max_seq_len: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """([width / 2] fp32 radians per position, factor on cos and sin)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    scaling = config.scaling
    if scaling is None:
        return 1.0 / config.theta**exponents, 1.0
    if scaling.type in ("ntk", "dynamic_ntk"):
        growth = scaling.factor
        if scaling.original_max_seq_len is not None:
            longest = max(max_seq_len, scaling.original_max_seq_len)
            growth = scaling.factor * longest / scaling.original_max_seq_len - (scaling.factor - 1)
        return 1.0 / (config.theta * growth ** (width / (width - 2))) ** exponents, 1.0
    rates = 1.0 / config.theta**exponents
    if scaling.type == "linear":
        return rates / scaling.factor, 1.0
    assert scaling.original_max_seq_len is not None
    if scaling.type == "llama3":
        turns = scaling.original_max_seq_len / (2 * math.pi / rates)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        divided = torch.where(kept == 0, rates / scaling.factor, (1 - kept) * rates / scaling.factor + kept * rates)
        return torch.where(kept == 1, rates, divided), 1.0
    return _yarn(scaling, config.theta, width, exponents, scaling.original_max_seq_len)


def _yarn(scaling: RopeScaling, theta: float, width: int, exponents: Tensor, original: int) -> tuple[Tensor, float]:
    def channel(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original length."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    index = torch.arange(width // 2, dtype=torch.float32, device=exponents.device)
    kept = 1 - ((index - low) / span).clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0
    wavelengths = theta**exponents
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept, factor


class Rope(PositionEncoding):
    """Rotates queries and keys; the tables are computed once per forward and shared by all layers of the same kind."""

    def __init__(self, config: RopeConfig, max_seq_len: int) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len = max_seq_len
        self.width = 0
        self.key = ""

    def for_heads(self, d_head: int) -> None:
        width = int(d_head * self.config.fraction)
        if width < 2 or width % 2:
            raise UserError(
                f"rope turns {width} of the {d_head} channels of a head (fraction {self.config.fraction:g}); "
                "this must be an even number of at least 2: change d_head or position.fraction"
            )
        if width == 2 and self.config.scaling is not None and "ntk" in self.config.scaling.type:
            raise UserError("rope scaling by ntk needs more than 2 rotating channels per head; change d_head")
        self.width = width
        self.key = f"rope/{width}/{self.max_seq_len}/{self.config.model_dump_json()}"

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        key = f"{self.key}/{dtype}"
        if key not in seq.derived:
            seq.derived[key] = self.tables(seq, dtype)

    def tables(self, seq: SeqInfo, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, signed sin) [B, T, 1, width], one value per channel: turned = x * cos + partner(x) * sin.

        Angles are computed in fp32 (fp64 for fp64 models). On a CPU the tables have `dtype`, which saves conversions;
        elsewhere at least fp32, as the rotation is then fused.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        device = seq.positions.device
        rates, factor = rope_rates(self.config, self.width, self.max_seq_len, device)
        angles = seq.positions[:, :, None, None].to(wide) * rates.to(wide)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if self.config.interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        kept = dtype if device.type == "cpu" else wide
        return cos.to(kept), sin.to(kept)

    def at_qk(self, q: Tensor, k: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor]:
        assert self.width, "the mixer calls for_heads when it is built"
        found: Any = seq.derived.get(f"{self.key}/{q.dtype}")
        cos, sin = found if found is not None else self.tables(seq, q.dtype)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, H, d_head] with its first `width` channels turned."""
        if self.width < x.shape[-1]:
            turning, rest = x.split([self.width, x.shape[-1] - self.width], dim=-1)
            return torch.cat([self.rotate(turning, cos, sin), rest], dim=-1)
        interleaved = self.config.interleaved
        if torch.compiler.is_compiling():
            return (x * cos + _partner(x, interleaved) * sin).to(x.dtype)
        if not torch.is_grad_enabled():
            return torch.addcmul(x * cos, _partner(x, interleaved), sin).to(x.dtype)
        return _Rotate.apply(x, cos, sin, interleaved)


def _partner(x: Tensor, interleaved: bool) -> Tensor:
    """Each channel's value replaced by that of the other channel of its pair."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)


class _Rotate(torch.autograd.Function):
    """The rotation in three passes; its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return torch.addcmul(x * cos, _partner(x, interleaved), sin).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        turned = torch.addcmul(grad * cos, _partner(grad, ctx.interleaved), sin, value=-1)
        return turned.to(grad.dtype), None, None, None
