"""Gated feed-forward layers: SwiGLU and GeGLU (Shazeer 2020)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer
from llm.blocks.channels.activations import ACTIVATIONS, gated
from llm.blocks.linears.dense import project_joined
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState


class GatedConfig(ChannelConfig):
    """down(act(gate(x)) * up(x)); d_hidden None: 8/3 of the model width, rounded up to a multiple of 32."""

    d_hidden: int | None = Field(None, ge=1)
    bias: bool = False

    def width(self, d_model: int) -> int:
        """Hidden width."""
        return self.d_hidden or (8 * d_model // 3 + 31) // 32 * 32

    def activation(self) -> str:
        """Name of the gate's activation."""
        raise NotImplementedError

    def build(self, ctx: BuildCtx) -> GatedChannel:
        return GatedChannel(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        hidden = self.width(dims.d_model)
        return (
            dims.linear(dims.d_model, hidden, role="channel.gate", bias=self.bias)
            + dims.linear(dims.d_model, hidden, role="channel.up", bias=self.bias)
            + dims.linear(hidden, dims.d_model, role="channel.down", bias=self.bias)
        )


@CHANNELS.register(
    "swiglu",
    tiny=lambda: SwiGLUConfig(d_hidden=24),
    paper="Shazeer 2020",
    about=About(
        equation="y = W_down (silu(W_gate x) ⊙ W_up x)",
        use="The usual choice of today: better than an MLP of the same size by a little, at the same FLOPs.",
        weakness="Three matrices instead of two, so a narrower hidden layer at equal parameters.",
    ),
)
class SwiGLUConfig(GatedConfig):
    """down(silu(gate(x)) * up(x)); d_hidden None: 8/3 of the model width, rounded up to a multiple of 32."""

    def activation(self) -> str:
        return "silu"


@CHANNELS.register(
    "geglu",
    tiny=lambda: GeGLUConfig(d_hidden=24),
    paper="Shazeer 2020",
    tinies={"tanh": lambda: GeGLUConfig(d_hidden=24, approximate="tanh", bias=True)},
    about=About(
        equation="y = W_down (gelu(W_gate x) ⊙ W_up x)",
        use="Models of the Gemma family, and wherever GELU is wanted with a gate.",
        weakness="As SwiGLU; the exact GELU costs more than SiLU.",
    ),
)
class GeGLUConfig(GatedConfig):
    """down(gelu(gate(x)) * up(x)); approximate "tanh" takes the tanh form of GELU (Gemma)."""

    approximate: Literal["none", "tanh"] = "none"

    def activation(self) -> str:
        return "gelu" if self.approximate == "none" else "gelu_tanh"


class GatedChannel(ChannelMixer):
    """gate, up [D -> hidden], down [hidden -> D]."""

    def __init__(self, config: GatedConfig, ctx: BuildCtx) -> None:
        super().__init__()
        hidden = config.width(ctx.d_model)
        self.activation = config.activation()
        self.gate = ctx.linear(ctx.d_model, hidden, role="channel.gate", bias=config.bias)
        self.up = ctx.linear(ctx.d_model, hidden, role="channel.up", bias=config.bias)
        self.down = ctx.linear(hidden, ctx.d_model, role="channel.down", bias=config.bias)

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        joined = project_joined(x, self.gate, self.up)
        if joined is None:
            return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
        return self.down(gated(joined, self.activation))
