"""Convolutional embedding: short causal convolutions before the first layer (LMUFormer, arXiv:2402.04882)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState, valid_counts


@MIXERS.register(
    "conv_embed",
    tiny=lambda: ConvEmbedConfig(n_convs=2),
    paper="arXiv:2402.04882 (LMUFormer)",
    status="experimental",
    tinies={"two_taps": lambda: ConvEmbedConfig(n_convs=1, width=2)},
    about=About(
        equation="z = (norm ∘ relu ∘ conv)^n(x), y = z + conv(z), all convolutions causal",
        use="As the mixer of a first layer without a channel mixer: bytes become pieces before they are mixed far.",
        weakness="It sees (n + 1)(width − 1) tokens back and no further; full convolutions cost `width` matrices each.",
    ),
)
class ConvEmbedConfig(MixerConfig):
    """n_convs causal convolutions of `width` taps, each with ReLU and the model's norm, then one that is added to its
    input as a relative position encoding.

    In a model it is the first layer: {mixer: conv_embed} without a channel, whose residual keeps the embedding beside
    it. For convolutions of each channel by itself see the channel mixer conv_channel.
    """

    n_convs: int = Field(4, ge=1)
    width: int = Field(3, ge=2)

    def build(self, ctx: BuildCtx) -> ConvEmbed:
        return ConvEmbed(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d = dims.d_model
        norms = sum((dims.norm(d, role="mixer.norm") for _ in range(self.n_convs)), Cost())
        for role in ["mixer.conv"] * self.n_convs + ["mixer.out"]:
            norms = norms + dims.linear(self.width * d, d, role=role)
        state = (self.n_convs + 1) * (self.width - 1) * d * dims.state_dtype_bytes
        return norms + Cost(state_bytes_per_seq=state)


class ConvEmbed(TokenMixer):
    """convs: n_convs and one more, each [width D -> D]; the state is their last inputs."""

    caps = Caps(rollback="free")

    def __init__(self, config: ConvEmbedConfig, ctx: BuildCtx) -> None:
        super().__init__()
        d = ctx.d_model
        roles = ["mixer.conv"] * config.n_convs + ["mixer.out"]
        self.convs = nn.ModuleList(
            FullConvolution(d, config.width, ctx.linear(config.width * d, d, role=role)) for role in roles
        )
        self.norms = nn.ModuleList(ctx.norm(d, role="mixer.norm") for _ in range(config.n_convs))

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self._run(x, seq, None)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        return self._run(x, seq, state)

    def _run(self, x: Tensor, seq: SeqInfo, state: CompositeState | None) -> Tensor:
        for index, norm in enumerate(self.norms):
            x = norm(F.relu(self._convolve(index, x, seq, state)))
        return x + self._convolve(len(self.norms), x, seq, state)

    def _convolve(self, index: int, x: Tensor, seq: SeqInfo, state: CompositeState | None) -> Tensor:
        conv = self.convs[index]
        assert isinstance(conv, FullConvolution)
        if state is None:
            return conv(x, seq)
        part = state[str(index)]
        assert isinstance(part, ConvState)
        return conv.extend(x, seq, part)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        return CompositeState(
            {
                str(index): conv.new_state(batch, n_tentative=n_tentative, dtype=dtype, device=device)  # type: ignore[operator]
                for index, conv in enumerate(self.convs)
            }
        )


class FullConvolution(nn.Module):
    """y_t = W [x_{t-width+1}; ...; x_t] within the document, W any linear [width C -> C]."""

    def __init__(self, channels: int, width: int, linear: nn.Module) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.linear = linear

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        """Whole documents, x [B, T, C] -> [B, T, C]."""
        past = self.width - 1
        taps = F.pad(x, (0, 0, past, 0)).unfold(1, self.width, 1)
        if seq.packed:
            ages = past - torch.arange(self.width, device=x.device)
            taps = torch.where((ages <= seq.positions[..., None])[:, :, None], taps, 0.0)
        return self.linear(taps.transpose(2, 3).flatten(2))

    def extend(self, x: Tensor, seq: SeqInfo, state: ConvState) -> Tensor:
        """The tokens after those in `state`, which is advanced by the real ones."""
        history = state.append(x, valid_counts(seq)).to(x.dtype)
        return self.linear(history.unfold(1, self.width, 1).transpose(2, 3).flatten(2))

    def new_state(
        self, batch: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> ConvState:
        """The last width - 1 inputs."""
        return ConvState(batch, self.width, self.channels, n_tentative=n_tentative, dtype=dtype, device=device)
