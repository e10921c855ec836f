"""Position encodings: none, ALiBi, learned and sinusoidal tables; the rotary ones are in llm/blocks/rope.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.blocks.base import POSITIONS, BuildCtx, PositionConfig, PositionEncoding, linear_init
from llm.blocks.rope import Rope, RopeConfig, RopeScaling  # noqa: F401  (all position encodings are found here)
from llm.core.cost import Cost
from llm.core.errors import UserError
from llm.core.init import Init
from llm.core.registry import About
from llm.core.seq import SeqInfo


@POSITIONS.register(
    "none",
    tiny=lambda: NoPositionConfig(),
    paper="Kazemnejad et al. 2023 (NoPE)",
    about=About(
        equation="nothing is added; the causal mask tells order",
        use="Recurrent and convolutional mixers, and attention that should extend in length.",
        weakness="Attention without positions learns order slowly and imprecisely.",
    ),
)
class NoPositionConfig(PositionConfig):
    """No position encoding at all: the causal mask alone tells order."""

    def build(self, ctx: BuildCtx) -> PositionEncoding:
        return PositionEncoding()


@POSITIONS.register(
    "alibi",
    tiny=lambda: AlibiConfig(),
    paper="Press et al. 2021 (ALiBi)",
    about=About(
        equation="score(q, k) −= slope_h · (position_q − position_k)",
        use="Attention which must run at lengths beyond those trained.",
        weakness="Far tokens are suppressed, so retrieval from far away suffers.",
    ),
)
class AlibiConfig(PositionConfig):
    """A bias -slope * distance on the scores; slopes are a geometric series over heads."""

    def build(self, ctx: BuildCtx) -> PositionEncoding:
        return Alibi()


class Alibi(PositionEncoding):
    """Slopes as in the paper; for a number of heads that is no power of two: those of the power p below it, followed
    by every other slope of 2p."""

    def slopes(self, n_heads: int) -> Tensor:
        power = 1 << (n_heads.bit_length() - 1)
        slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
        between = [2.0 ** (-8.0 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)]
        return torch.tensor(slopes + between[: n_heads - power], dtype=torch.float32, device="cpu")


@POSITIONS.register(
    "learned",
    tiny=lambda: LearnedPositionConfig(),
    paper="Gehring et al. 2017; Radford et al. 2019 (GPT-2)",
    about=About(
        equation="x_t += P[t]",
        use="GPT-2 and other models of fixed context.",
        weakness="It has a row per position, hence no context beyond max_seq_len.",
    ),
)
class LearnedPositionConfig(PositionConfig):
    """A trained table [max_seq_len, d_model] added to the embeddings."""

    std: float | None = None

    def build(self, ctx: BuildCtx) -> PositionEncoding:
        return LearnedPosition(self, ctx)

    def build_for_mixer(self, ctx: BuildCtx) -> PositionEncoding:
        return PositionEncoding()

    def cost(self, d_model: int, max_seq_len: int) -> Cost:
        return Cost(params=max_seq_len * d_model, active_params=d_model)


def positions_within(seq: SeqInfo, longest: int, what: str) -> Tensor:
    """Positions [B, T], 0 at padding, for a table of `longest` rows that is called `what`; UserError beyond its end,
    where looking costs nothing."""
    positions = seq.positions if seq.valid is None else torch.where(seq.valid, seq.positions, 0)
    if positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel():
        needed = int(positions.max()) + 1
        if needed > longest:
            raise UserError(
                f"a sequence of {needed} tokens is longer than {what} of {longest}; shorten it or train a model with a "
                "larger model.max_seq_len"
            )
    return positions


class LearnedPosition(PositionEncoding):
    """weight [max_seq_len, D]."""

    def __init__(self, config: LearnedPositionConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ctx.max_seq_len, ctx.d_model))
        std = config.std if config.std is not None else ctx.init.std
        self.init = linear_init(std if std is not None else ctx.d_model**-0.5, ctx.init)

    def at_embed(self, x: Tensor, seq: SeqInfo) -> Tensor:
        longest = self.weight.shape[0]
        needed = x.shape[1] if not seq.packed else 0
        if seq.positions.device.type == "cpu" and not torch.compiler.is_compiling():
            needed = int(seq.positions.max()) + 1
        if needed > longest:
            raise UserError(
                f"a sequence of {needed} tokens is longer than the learned position table of {longest}; "
                "shorten it or train a model with a larger model.max_seq_len"
            )
        return x + F.embedding(seq.positions, self.weight).to(x.dtype)

    def init_spec(self) -> dict[str, Init]:
        return {"weight": self.init}


@POSITIONS.register(
    "sinusoidal",
    tiny=lambda: SinusoidalConfig(),
    paper="Vaswani et al. 2017",
    about=About(
        equation="x_t += [sin(t ω_i), cos(t ω_i)]",
        use="The original transformer; positions without parameters.",
        weakness="Mixed into the content; extends in length badly.",
    ),
)
class SinusoidalConfig(PositionConfig):
    """Fixed sines (first half of the channels) and cosines (second half) added to the embeddings."""

    theta: float = 10000.0

    def build(self, ctx: BuildCtx) -> PositionEncoding:
        if ctx.d_model % 2:
            raise UserError(f"sinusoidal positions need an even model.d_model, not {ctx.d_model}")
        return Sinusoidal(self)

    def build_for_mixer(self, ctx: BuildCtx) -> PositionEncoding:
        return PositionEncoding()


class Sinusoidal(PositionEncoding):
    """Channel i of each half has the wavelength 2 pi theta^(2i / D)."""

    def __init__(self, config: SinusoidalConfig) -> None:
        super().__init__()
        self.theta = config.theta

    def at_embed(self, x: Tensor, seq: SeqInfo) -> Tensor:
        half = x.shape[-1] // 2
        rates = torch.exp(torch.arange(half, device=x.device, dtype=torch.float32) * (-math.log(self.theta) / half))
        angles = seq.positions[..., None].float() * rates
        return x + torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)
