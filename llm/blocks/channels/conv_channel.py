"""Convolutional channel mixers: a feed-forward layer whose hidden units see their last few tokens, and its spiking form
(LMUFormer, arXiv:2402.04882)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer
from llm.blocks.channels.activations import ACTIVATIONS, Activation
from llm.blocks.mixers.lmu import write_states
from llm.blocks.short_conv import ShortConvolution, short_conv_cost
from llm.blocks.spiking import NeuronConfig, fire, rests
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState, RecurrentState


class _ConvConfig(ChannelConfig):
    """d_hidden None: 4 times the model width. width: taps of the causal convolution of each hidden unit over its own
    last tokens; 1 for none, as published."""

    d_hidden: int | None = Field(None, ge=1)
    width: int = Field(3, ge=1)
    bias: bool = True

    def hidden(self, d_model: int) -> int:
        """Hidden width."""
        return self.d_hidden or 4 * d_model

    def shared_cost(self, dims: Dims) -> Cost:
        """Both products, the hidden norm and the convolution."""
        d, hidden = dims.d_model, self.hidden(dims.d_model)
        cost = (
            dims.linear(d, hidden, role="channel.up", bias=self.bias)
            + dims.norm(hidden, role="channel.hidden_norm")
            + dims.linear(hidden, d, role="channel.down", bias=self.bias)
        )
        return cost if self.width == 1 else cost + short_conv_cost(hidden, self.width, False, dims.state_dtype_bytes)


@CHANNELS.register(
    "conv_channel",
    tiny=lambda: ConvChannelConfig(d_hidden=24),
    paper="arXiv:2402.04882 (LMUFormer)",
    status="experimental",
    tinies={
        "published": lambda: ConvChannelConfig(d_hidden=24, width=1, closing=True),
        "wide": lambda: ConvChannelConfig(d_hidden=16, width=5, activation="silu", bias=False),
    },
    about=About(
        equation="y = W_down act(norm(conv(W_up x))), conv causal over each unit's own last tokens",
        use="Beside a mixer that sees the near past badly, such as an LMU, or for local patterns at little cost.",
        weakness="A norm over the hidden units costs a pass over the widest activation; it needs a decode state.",
    ),
)
class ConvChannelConfig(_ConvConfig):
    """down(act(norm(conv(up(x))))), with the model's norm where the paper has batch norm.

    closing: norm and ReLU after `down` too, as published; the branch can then only add to the residual stream.
    """

    activation: Activation = "gelu"
    closing: bool = False

    def build(self, ctx: BuildCtx) -> ConvChannel:
        return ConvChannel(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        closing = dims.norm(dims.d_model, role="channel.norm") if self.closing else Cost()
        return self.shared_cost(dims) + closing


class ConvChannel(ChannelMixer):
    """up [D -> hidden], conv [hidden, 1, width], down [hidden -> D]."""

    def __init__(self, config: ConvChannelConfig, ctx: BuildCtx) -> None:
        super().__init__()
        hidden = config.hidden(ctx.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.up = ctx.linear(ctx.d_model, hidden, role="channel.up", bias=config.bias)
        self.conv = ShortConvolution(hidden, config.width, activation=None) if config.width > 1 else None
        self.hidden_norm = ctx.norm(hidden, role="channel.hidden_norm")
        self.down = ctx.linear(hidden, ctx.d_model, role="channel.down", bias=config.bias)
        self.norm = ctx.norm(ctx.d_model, role="channel.norm") if config.closing else None

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        hidden = _convolve(self.conv, self.up(x), seq, state)
        y = self.down(self.activation(self.hidden_norm(hidden)))
        return y if self.norm is None else F.relu(self.norm(y))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState | None:
        return _conv_state(self.conv, batch, n_tentative=n_tentative, dtype=dtype, device=device)


@CHANNELS.register(
    "conv_channel_spiking",
    tiny=lambda: SpikingConvChannelConfig(d_hidden=128, neuron=NeuronConfig(threshold=0.5, sharpness=2)),
    paper="arXiv:2402.04882 (LMUFormer)",
    status="experimental",
    tinies={
        "published": lambda: SpikingConvChannelConfig(
            d_hidden=128, width=1, neuron=NeuronConfig(threshold=0.5, sharpness=2)
        )
    },
    exempt={
        "gradients": "A spike is a step function; its gradient is a surrogate, not what finite differences measure.",
        "bf16": "A spike is a step function, so rounding near the threshold turns it over and changes the rest.",
    },
    about=About(
        equation="y = W_down LIF(norm(conv(W_up LIF(norm(x)))))",
        use="Beside the spiking LMU, for models whose products take inputs of 0 and 1 alone.",
        weakness="Slow on CPUs and GPUs, since neurons go token by token; gradients are surrogates.",
    ),
)
class SpikingConvChannelConfig(_ConvConfig):
    """down(LIF(norm(conv(up(LIF(norm(x))))))): neurons stand before the products, so that the residual stream stays
    real. The first norm is the block's own, so that neurons fire whatever the residual style."""

    input_neuron: NeuronConfig = NeuronConfig(threshold=0.5)
    neuron: NeuronConfig = NeuronConfig()

    def build(self, ctx: BuildCtx) -> SpikingConvChannel:
        return SpikingConvChannel(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        potentials = (dims.d_model + self.hidden(dims.d_model)) * max(4, dims.state_dtype_bytes)
        norm = dims.norm(dims.d_model, role="channel.norm")
        return self.shared_cost(dims) + norm + Cost(state_bytes_per_seq=potentials)


class SpikingConvChannel(ChannelMixer):
    """up [D -> hidden], conv [hidden, 1, width], down [hidden -> D]; the state is two layers of potentials, and the
    convolution's."""

    def __init__(self, config: SpikingConvChannelConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden(ctx.d_model)
        self.norm = ctx.norm(ctx.d_model, role="channel.norm")
        self.up = ctx.linear(ctx.d_model, hidden, role="channel.up", bias=config.bias)
        self.conv = ShortConvolution(hidden, config.width, activation=None) if config.width > 1 else None
        self.hidden_norm = ctx.norm(hidden, role="channel.hidden_norm")
        self.down = ctx.linear(hidden, ctx.d_model, role="channel.down", bias=config.bias)
        self.shapes = {"x": (ctx.d_model,), "hidden": (hidden,)}

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        if state is None:
            keep = rests(seq)
            spikes, _ = fire(self.norm(x), self.config.input_neuron, keep=keep)
            hidden = self.hidden_norm(_convolve(self.conv, self.up(spikes), seq, None))
            return self.down(fire(hidden, self.config.neuron, keep=keep)[0])
        assert isinstance(state, CompositeState)
        potentials = state["potentials"]
        assert isinstance(potentials, RecurrentState)
        before, each = potentials.read(), {}
        spikes, each["x"] = fire(self.norm(x), self.config.input_neuron, potential=before["x"])
        hidden = self.hidden_norm(_convolve(self.conv, self.up(spikes), seq, state.parts.get("conv")))
        spikes, each["hidden"] = fire(hidden, self.config.neuron, potential=before["hidden"])
        write_states(potentials, before, each, seq)
        return self.down(spikes)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState | None:
        wide = torch.promote_types(dtype, torch.float32)
        potentials = RecurrentState(batch, self.shapes, n_tentative=n_tentative, dtype=wide, device=device)
        conv = _conv_state(self.conv, batch, n_tentative=n_tentative, dtype=dtype, device=device)
        parts: dict[str, DecodeState] = {"potentials": potentials}
        return CompositeState(parts if conv is None else parts | {"conv": conv})


def _convolve(conv: ShortConvolution | None, x: Tensor, seq: SeqInfo, state: DecodeState | None) -> Tensor:
    if conv is None:
        return x
    if state is None:
        return conv(x, seq)
    assert isinstance(state, ConvState)
    return conv.extend(x, seq, state)


def _conv_state(
    conv: ShortConvolution | None, batch: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
) -> ConvState | None:
    return None if conv is None else conv.new_state(batch, n_tentative=n_tentative, dtype=dtype, device=device)
