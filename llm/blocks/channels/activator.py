"""Activator's gating unit: a GEGLU whose two branches are normalised by one shared LayerNorm."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer
from llm.blocks.linears.dense import project
from llm.blocks.norms import LayerNormConfig
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState


@CHANNELS.register(
    "activator",
    tiny=lambda: ActivatorConfig(d_hidden=24),
    paper="arXiv:2405.15953",
    status="experimental",
    tinies={"unbiased": lambda: ActivatorConfig(bias=False)},
    about=About(
        equation="y = W_3 (LN(gelu(W_1 x)) ⊙ LN(W_2 x)), one LayerNorm for both branches",
        use="A gated feed-forward layer whose branches cannot grow. It mixes no tokens: it replaces the channel mixer, "
        "not attention. The token-mixing variant is the mixer `glu_token_mixing`.",
        weakness="Two norms of the hidden width per token; published for images, as a per-patch classifier.",
    ),
)
class ActivatorConfig(ChannelConfig):
    """down(LN(gelu(gate(x))) * LN(up(x))); d_hidden None: twice the model width. bias: on the three linears."""

    d_hidden: int | None = Field(None, ge=1)
    bias: bool = True

    def width(self, d_model: int) -> int:
        """Hidden width."""
        return self.d_hidden or 2 * d_model

    def build(self, ctx: BuildCtx) -> Activator:
        return Activator(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        hidden = self.width(dims.d_model)
        return (
            dims.linear(dims.d_model, hidden, role="channel.gate", bias=self.bias)
            + dims.linear(dims.d_model, hidden, role="channel.up", bias=self.bias)
            + dims.linear(hidden, dims.d_model, role="channel.down", bias=self.bias)
            + LayerNormConfig().cost(hidden)
        )


class Activator(ChannelMixer):
    """gate, up [D -> hidden], norm [hidden], down [hidden -> D]."""

    def __init__(self, config: ActivatorConfig, ctx: BuildCtx) -> None:
        super().__init__()
        hidden = config.width(ctx.d_model)
        self.gate = ctx.linear(ctx.d_model, hidden, role="channel.gate", bias=config.bias)
        self.up = ctx.linear(ctx.d_model, hidden, role="channel.up", bias=config.bias)
        self.norm = LayerNormConfig().build(hidden)
        self.down = ctx.linear(hidden, ctx.d_model, role="channel.down", bias=config.bias)

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        gate, up = project(x, self.gate, self.up)
        return self.down(self.norm(F.gelu(gate)) * self.norm(up))
