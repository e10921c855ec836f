"""Residual styles: where the norms stand around the mixer and the channel mixer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from llm.blocks.base import RESIDUALS, BuildCtx, Residual, ResidualConfig, compute_dtype
from llm.core.cost import Cost, Dims
from llm.core.registry import About

Part = Callable[[Tensor], Tensor]


def _enter(norm: nn.Module | None, x: Tensor) -> Tensor:
    """What a part gets: normalised, and under autocast in its dtype, so that the part's several linears need not each
    convert it. The stream itself keeps its dtype."""
    y = x if norm is None else norm(x)
    return y.to(compute_dtype(y.device, y.dtype))


class _SequentialResidual(Residual):
    """x = x + after(mixer(before(x))), then the same with the channel mixer, then an optional norm of the sum."""

    mixer_norm: nn.Module | None
    mixer_post_norm: nn.Module | None
    mixer_sum_norm: nn.Module | None
    channel_norm: nn.Module | None
    channel_post_norm: nn.Module | None
    channel_sum_norm: nn.Module | None

    def __init__(
        self, ctx: BuildCtx, *, mixer: bool, channel: bool, before: bool, after: bool, of_sum: bool = False
    ) -> None:
        super().__init__()
        self.dropout = ctx.dropout
        for part, present in (("mixer", mixer), ("channel", channel)):
            for place, wanted in (("norm", before), ("post_norm", after), ("sum_norm", of_sum)):
                make = present and wanted
                self.add_module(
                    f"{part}_{place}", ctx.norm(ctx.d_model, role=f"residual.{part}_{place}") if make else None
                )

    def forward(self, x: Tensor, mixer: Part | None, channel: Part | None) -> Tensor:
        if mixer is not None:
            x = self._join(x, mixer, self.mixer_norm, self.mixer_post_norm, self.mixer_sum_norm)
        if channel is not None:
            x = self._join(x, channel, self.channel_norm, self.channel_post_norm, self.channel_sum_norm)
        return x

    def _join(
        self, x: Tensor, part: Part, before: nn.Module | None, after: nn.Module | None, of_sum: nn.Module | None
    ) -> Tensor:
        y = part(_enter(before, x))
        if after is not None:
            y = after(y)
        if self.training and self.dropout:
            y = F.dropout(y, self.dropout)
        x = x + y
        return of_sum(x) if of_sum is not None else x


def _norms_cost(dims: Dims, count: int) -> Cost:
    return sum((dims.norm(dims.d_model, role="residual.norm") for _ in range(count)), Cost())


@RESIDUALS.register(
    "pre",
    tiny=lambda: PreNormConfig(),
    paper="Xiong et al. 2020",
    about=About(
        equation="x ← x + f(norm(x))",
        use="The usual choice: trains at any depth without warm-up tricks.",
        weakness="The residual stream grows with depth, so late layers change it less.",
    ),
)
class PreNormConfig(ResidualConfig):
    """x + f(norm(x)): GPT-2, Llama."""

    def build(self, ctx: BuildCtx, *, mixer: bool, channel: bool) -> Residual:
        return _SequentialResidual(ctx, mixer=mixer, channel=channel, before=True, after=False)

    def cost(self, dims: Dims, *, mixer: bool, channel: bool) -> Cost:
        return _norms_cost(dims, mixer + channel)


@RESIDUALS.register(
    "post",
    tiny=lambda: PostNormConfig(),
    paper="Vaswani et al. 2017",
    about=About(
        equation="x ← norm(x + f(x))",
        use="The original transformer and papers which were tuned with it.",
        weakness="Deep stacks need warm-up and small rates.",
    ),
)
class PostNormConfig(ResidualConfig):
    """norm(x + f(x)): the original transformer."""

    def build(self, ctx: BuildCtx, *, mixer: bool, channel: bool) -> Residual:
        return _SequentialResidual(ctx, mixer=mixer, channel=channel, before=False, after=False, of_sum=True)

    def cost(self, dims: Dims, *, mixer: bool, channel: bool) -> Cost:
        return _norms_cost(dims, mixer + channel)


@RESIDUALS.register(
    "sandwich",
    tiny=lambda: SandwichNormConfig(),
    paper="Ding et al. 2021 (CogView)",
    about=About(
        equation="x ← x + norm(f(norm(x)))",
        use="Low precision and large models: branch outputs stay bounded.",
        weakness="Two more norms per layer; slower by a few percent.",
    ),
)
class SandwichNormConfig(ResidualConfig):
    """x + norm(f(norm(x))): CogView, Gemma 2."""

    def build(self, ctx: BuildCtx, *, mixer: bool, channel: bool) -> Residual:
        return _SequentialResidual(ctx, mixer=mixer, channel=channel, before=True, after=True)

    def cost(self, dims: Dims, *, mixer: bool, channel: bool) -> Cost:
        return _norms_cost(dims, 2 * (mixer + channel))


@RESIDUALS.register(
    "parallel",
    tiny=lambda: ParallelResidualConfig(),
    paper="Wang and Komatsuzaki 2021 (GPT-J)",
    tinies={"shared": lambda: ParallelResidualConfig(shared_norm=True)},
    about=About(
        equation="x ← x + mixer(norm(x)) + channel(norm(x))",
        use="Throughput at scale: both branches can run at once.",
        weakness="Slightly worse at small sizes, since the channel does not see the mixer of its layer.",
    ),
)
class ParallelResidualConfig(ResidualConfig):
    """x + mixer(norm(x)) + channel(norm'(x)); `shared_norm` uses one norm for both (GPT-J), else two (GPT-NeoX)."""

    shared_norm: bool = False

    def build(self, ctx: BuildCtx, *, mixer: bool, channel: bool) -> Residual:
        return _ParallelResidual(ctx, mixer=mixer, channel=channel, shared_norm=self.shared_norm)

    def cost(self, dims: Dims, *, mixer: bool, channel: bool) -> Cost:
        return _norms_cost(dims, 1 if self.shared_norm else mixer + channel)


class _ParallelResidual(Residual):
    mixer_norm: nn.Module | None
    channel_norm: nn.Module | None

    def __init__(self, ctx: BuildCtx, *, mixer: bool, channel: bool, shared_norm: bool) -> None:
        super().__init__()
        self.dropout = ctx.dropout
        self.shared_norm = shared_norm
        self.add_module(
            "mixer_norm", ctx.norm(ctx.d_model, role="residual.mixer_norm") if mixer or shared_norm else None
        )
        own = channel and not shared_norm
        self.add_module("channel_norm", ctx.norm(ctx.d_model, role="residual.channel_norm") if own else None)

    def forward(self, x: Tensor, mixer: Part | None, channel: Part | None) -> Tensor:
        y = x
        normed = _enter(self.mixer_norm, x) if self.mixer_norm is not None else x
        if mixer is not None:
            y = y + F.dropout(mixer(normed), self.dropout, self.training)
        if channel is not None:
            entered = normed if self.shared_norm else _enter(self.channel_norm, x)
            y = y + F.dropout(channel(entered), self.dropout, self.training)
        return y
