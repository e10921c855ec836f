"""Sequence classifiers over frames (audio, sensors, pixels in a row) around the LMU cell, whole or as a stream.

LMUFormer, arXiv:2402.04882: convolutional patch embedding, blocks of LMU cell and convolutional channel mixer, and a
linear head on every frame whose outputs are averaged. A model here is no decoder and is trained by a loop of its own
(`python -m evals.lmu digits` shows one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from llm.blocks.base import InitConfig
from llm.blocks.linears.dense import DenseLinear
from llm.blocks.spiking import NeuronConfig
from llm.config.base import Config
from llm.core.errors import UserError
from llm.models.streaming import BatchNorm, Chain, Convolution, LMUCell, Neurons, ResidualStage

Style = Literal["relu", "spiking", "spiking_shortcut"]


class StemConfig(Config):
    """What turns input frames into `channels` (None: d_model) channels: n_convs convolutions of `width` taps, each with
    ReLU and batch norm (the norm first where norm_first), then one that is added to its input as relative position
    encoding, where `relative`."""

    n_convs: int = Field(4, ge=1)
    width: int = Field(3, ge=1)
    channels: int | None = Field(None, ge=1)
    bias: bool = False
    relative: bool = True
    norm_first: bool = False


class SequenceClassifierConfig(Config):
    """A classifier of sequences of frames with d_input numbers.

    n_blocks: LMU cell and channel mixer, both residual; 0 for the cell alone, without residual. order, window: of the
    memory. expansion: hidden width of the channel mixer over d_model.
    style: relu, as published; spiking puts batch norm and a spiking neuron behind every convolution ("slmu" of the
    authors' code); spiking_shortcut puts them before, so that residuals stay real ("slmu_ms").
    causal: convolutions see no later frame, so a stream is answered at once; as published each looks one frame ahead.
    pool: the logits' mean over frames, or those of the last one. dropout: before the head.
    """

    d_input: int = Field(ge=1)
    n_classes: int = Field(ge=2)
    d_model: int = Field(256, ge=1)
    order: int = Field(256, ge=1)
    window: float = Field(128.0, gt=0)
    n_blocks: int = Field(1, ge=0)
    expansion: int = Field(4, ge=1)
    stem: StemConfig | None = StemConfig()
    style: Style = "relu"
    causal: bool = False
    pool: Literal["mean", "last"] = "mean"
    dropout: float = Field(0.0, ge=0, lt=1)
    neuron: NeuronConfig = NeuronConfig()
    block_neuron: NeuronConfig = NeuronConfig(threshold=0.5)

    @model_validator(mode="after")
    def _parts_fit(self) -> SequenceClassifierConfig:
        d_stem = self.d_input if self.stem is None else self.stem.channels or self.d_model
        if self.n_blocks and d_stem != self.d_model:
            raise UserError(
                f"classifier: blocks are residual and {self.d_model} wide, the frames that reach them {d_stem}; "
                "set d_model to that, stem.channels to null, or n_blocks: 0"
            )
        if self.style != "relu" and (self.stem is None or self.stem.norm_first or not self.stem.relative):
            raise UserError(
                f"classifier: style {self.style!r} has the published stem; leave stem.relative true and "
                "stem.norm_first false"
            )
        if self.stem is not None and not self.causal and self.stem.width % 2 == 0:
            raise UserError(
                f"classifier: stem.width {self.stem.width} cannot look as far ahead as back; take an odd one or "
                "causal: true"
            )
        return self

    def build(self, device: str = "meta") -> SequenceClassifier:
        """The module; `llm.core.init.initialise` gives it values."""
        with torch.device(device):
            return SequenceClassifier(self)


@dataclass
class StreamState:
    """stages: what the body remembers. total [B, D]: sum of all features so far, over n_frames frames."""

    stages: Any
    total: Tensor
    n_frames: int = 0


class SequenceClassifier(nn.Module):
    """body: frames to features [B, N, D]; head [D -> classes]."""

    def __init__(self, config: SequenceClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _body(config)
        self.head = DenseLinear(
            config.d_model, config.n_classes, bias=True, std=0.02, init=InitConfig(distribution="truncated_normal")
        )

    @property
    def lookahead(self) -> int:
        """Frames by which the logits of a stream are late."""
        return self.body.lookahead

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of whole sequences x [B, N, d_input]."""
        features = self.body(x)
        pooled = features.mean(dim=1) if self.config.pool == "mean" else features[:, -1]
        return self.head(F.dropout(pooled, self.config.dropout, self.training))

    def prefix_logits(self, x: Tensor) -> Tensor:
        """[B, N, classes]: at each frame, the logits over the frames so far (their features may have seen
        `lookahead` more)."""
        features = self.body(x)
        if self.config.pool == "mean":
            counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=features.dtype)
            features = features.cumsum(dim=1) / counts[:, None]
        return self.head(features)

    def new_state(
        self, batch: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> StreamState:
        """The state of a stream before its first frame, of constant size."""
        total = torch.zeros(batch, self.config.d_model, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return StreamState(self.body.new_state(batch, dtype, device), total)

    @torch.no_grad()
    def stream(self, x: Tensor, state: StreamState, *, last: bool = False) -> Tensor:
        """The next frames x [B, n, d_input] (none or many) -> logits [B, n', classes] of `prefix_logits` at the frames
        that they complete. `last` ends the stream: together the calls give N of them. In evaluation mode alone."""
        assert not self.training, "a stream has no batch to normalise over: call eval() first"
        features = self.body.extend(x, state.stages, last)
        n_new = features.shape[1]
        if not n_new:
            return features.new_empty(x.shape[0], 0, self.config.n_classes)
        if self.config.pool == "mean":
            sums = state.total[:, None] + features.to(state.total.dtype).cumsum(dim=1)
            counts = state.n_frames + torch.arange(1, n_new + 1, device=x.device, dtype=sums.dtype)
            state.total, features = sums[:, -1], (sums / counts[:, None]).to(features.dtype)
        state.n_frames += n_new
        return self.head(features)


def _body(config: SequenceClassifierConfig) -> Chain:
    d = config.d_model
    d_stem = config.d_input if config.stem is None else config.stem.channels or d
    neuron = None if config.style == "relu" else config.neuron
    stages: list[nn.Module] = [] if config.stem is None else _stem(config, config.stem)
    if not config.n_blocks:
        stages.append(LMUCell(d_stem, d, config.order, config.window, neuron=neuron))
    for _ in range(config.n_blocks):
        stages += _block(config)
    if config.style == "spiking_shortcut":
        stages += [BatchNorm(d), Neurons(config.neuron)]
    return Chain(*stages)


def _stem(config: SequenceClassifierConfig, stem: StemConfig) -> list[nn.Module]:
    """Published orders: conv, ReLU, norm; conv, norm, neuron; and for the shortcut conv, then norm, neuron, conv."""
    channels = stem.channels or config.d_model

    def conv(d_in: int) -> Convolution:
        return Convolution(d_in, channels, stem.width, bias=stem.bias, causal=config.causal)

    def fire() -> list[nn.Module]:
        return [BatchNorm(channels), Neurons(config.neuron)]

    stages: list[nn.Module] = []
    for index in range(stem.n_convs):
        first = conv(config.d_input if index == 0 else channels)
        if config.style == "relu":
            act = [BatchNorm(channels), nn.ReLU()] if stem.norm_first else [nn.ReLU(), BatchNorm(channels)]
            stages += [first, *act]
        elif config.style == "spiking":
            stages += [first, *fire()]
        else:
            stages += [first] if index == 0 else [*fire(), first]
    if stem.relative:
        before, after = config.style == "spiking_shortcut", config.style == "spiking"
        stages.append(ResidualStage(Chain(*(fire() if before else []), conv(channels), *(fire() if after else []))))
    return stages


def _block(config: SequenceClassifierConfig) -> list[nn.Module]:
    """LMU cell with its projection, then the channel mixer."""
    d, hidden = config.d_model, config.expansion * config.d_model
    up, down = Convolution(d, hidden, bias=True), Convolution(hidden, d, bias=True)
    project = Convolution(d, d, bias=True)
    if config.style == "relu":
        cell = LMUCell(d, d, config.order, config.window)
        mixer = Chain(up, BatchNorm(hidden), nn.GELU(), down, BatchNorm(d), nn.ReLU())
        return [ResidualStage(Chain(cell, project, BatchNorm(d))), ResidualStage(mixer)]
    cell = LMUCell(d, d, config.order, config.window, neuron=config.neuron)

    def fire(channels: int, neuron: NeuronConfig = config.neuron) -> list[nn.Module]:
        return [BatchNorm(channels), Neurons(neuron)]

    if config.style == "spiking":
        return [
            ResidualStage(Chain(cell, project, *fire(d))),
            ResidualStage(Chain(up, *fire(hidden), down, *fire(d))),
        ]
    return [
        ResidualStage(Chain(*fire(d, config.block_neuron), cell, *fire(d), project)),
        ResidualStage(Chain(*fire(d), up, *fire(hidden), down)),
    ]
