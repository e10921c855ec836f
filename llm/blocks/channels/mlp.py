"""The feed-forward layer of the original transformer, with a choice of activation."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer
from llm.blocks.channels.activations import ACTIVATIONS, Activation
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState


@CHANNELS.register(
    "mlp",
    tiny=lambda: MLPConfig(d_hidden=24),
    paper="Vaswani et al. 2017; Hendrycks and Gimpel 2016 (GELU)",
    tinies={
        "gelu_tanh": lambda: MLPConfig(d_hidden=24, activation="gelu_tanh", bias=True),
        "relu": lambda: MLPConfig(d_hidden=24, activation="relu"),
        "relu2": lambda: MLPConfig(d_hidden=24, activation="relu2"),
        "silu": lambda: MLPConfig(d_hidden=24, activation="silu"),
    },
    about=About(
        equation="y = W_down act(W_up x)",
        use="The plainest feed-forward layer: GPT-2, Pythia, and baselines. relu2 is the cheap strong one.",
        weakness="Usually a little worse than a gated layer at equal parameters.",
    ),
)
class MLPConfig(ChannelConfig):
    """down(act(up(x))); d_hidden None: 4 times the model width. relu2 is the squared ReLU of Primer."""

    d_hidden: int | None = Field(None, ge=1)
    activation: Activation = "gelu"
    bias: bool = False

    def width(self, d_model: int) -> int:
        """Hidden width."""
        return self.d_hidden or 4 * d_model

    def build(self, ctx: BuildCtx) -> MLP:
        return MLP(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        hidden = self.width(dims.d_model)
        return dims.linear(dims.d_model, hidden, role="channel.up", bias=self.bias) + dims.linear(
            hidden, dims.d_model, role="channel.down", bias=self.bias
        )


class MLP(ChannelMixer):
    """up [D -> hidden], down [hidden -> D]."""

    def __init__(self, config: MLPConfig, ctx: BuildCtx) -> None:
        super().__init__()
        hidden = config.width(ctx.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.up = ctx.linear(ctx.d_model, hidden, role="channel.up", bias=config.bias)
        self.down = ctx.linear(hidden, ctx.d_model, role="channel.down", bias=config.bias)

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        return self.down(self.activation(self.up(x)))
