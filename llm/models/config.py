"""ModelConfig: a decoder as data, from which it is built, counted and costed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator

import llm.blocks  # noqa: F401  (registers the blocks that the fields below look up)
from llm.blocks.base import (
    BuildCtx,
    ChannelConfig,
    InitConfig,
    LinearConfig,
    MixerConfig,
    NormConfig,
    PositionConfig,
    ResidualConfig,
)
from llm.blocks.norms import RMSNormConfig
from llm.blocks.positions import RopeConfig
from llm.blocks.residuals import PreNormConfig
from llm.config.base import Config, Count
from llm.config.load import merge
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.models.wrappers.base import CostOf, WrapperConfig

if TYPE_CHECKING:
    from llm.models.decoder import Decoder
    from llm.models.wrappers.base import Wrapper


class BlockConfig(Config):
    """One layer: a token mixer, a channel mixer, or both, joined to the residual stream.

    norm and position override the model's own for this block.
    """

    mixer: MixerConfig | None = None
    channel: ChannelConfig | None = None
    residual: ResidualConfig = PreNormConfig()
    norm: NormConfig | None = None
    position: PositionConfig | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> BlockConfig:
        if self.mixer is None and self.channel is None:
            raise UserError("a block needs a mixer, a channel, or both")
        return self


class LayerGroup(Config):
    """`pattern` repeated `repeat` times."""

    pattern: list[BlockConfig] = Field(min_length=1)
    repeat: int = Field(1, ge=1)


class EmbedConfig(Config):
    """Token embedding. scale: factor on its output. std: initial standard deviation (None: as linear layers).
    norm: normalise its output."""

    scale: float = 1.0
    std: float | None = None
    norm: NormConfig | None = None


class HeadConfig(Config):
    """Output layer. tied: use the embedding matrix. softcap: logits become cap * tanh(logits / cap)."""

    tied: bool = True
    bias: bool = False
    softcap: float | None = Field(None, gt=0)


class ModelConfig(Config):
    """A decoder. `variant` takes a named model of llm/models/zoo, on which the other keys given are laid.

    vocab_size None: the tokenizer's. linear: role glob -> linear config. wrappers: what stands around the decoder, the
    innermost first.
    """

    variant: str | None = None
    vocab_size: Count | None = Field(None, ge=2)
    d_model: int = Field(ge=1)
    max_seq_len: Count = Field(1024, ge=1)
    layers: list[LayerGroup] = Field(min_length=1)
    embed: EmbedConfig = EmbedConfig()
    position: PositionConfig = RopeConfig()
    norm: NormConfig = RMSNormConfig()
    final_norm: NormConfig | None = None
    head: HeadConfig = HeadConfig()
    linear: dict[str, LinearConfig] = {}
    init: InitConfig = InitConfig()
    dropout: float = Field(0.0, ge=0, lt=1)
    wrappers: list[WrapperConfig] = []

    @model_validator(mode="before")
    @classmethod
    def _from_variant(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("variant") is None:
            return value
        from llm.models.zoo import variant

        return merge(variant(value["variant"]), value)

    def blocks(self) -> list[BlockConfig]:
        """One config per layer."""
        return [block for group in self.layers for _ in range(group.repeat) for block in group.pattern]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return sum(group.repeat * len(group.pattern) for group in self.layers)

    @property
    def max_context(self) -> int | None:
        """Longest sequence that all parts can read: max_seq_len where positions are learned; None: any."""
        if any(wrapper.restarts_positions() for wrapper in self.wrappers):
            return None
        blocks = self.blocks()
        limits = [block.mixer.longest(self.max_seq_len) for block in blocks if block.mixer is not None]
        if "learned" in (self.position.type, *(block.position.type for block in blocks if block.position)):
            limits.append(self.max_seq_len)
        return min((limit for limit in limits if limit is not None), default=None)

    def context(self, layer: int, block: BlockConfig | None = None) -> BuildCtx:
        """What the block at `layer` may know."""
        return BuildCtx(
            d_model=self.d_model,
            layer=layer,
            n_layers=self.n_layers,
            max_seq_len=self.max_seq_len,
            linears=self.linear,
            norm_config=(block.norm if block else None) or self.norm,
            position_config=(block.position if block else None) or self.position,
            init=self.init,
            dropout=self.dropout,
        )

    def build(self, device: str = "meta") -> Decoder | Wrapper:
        """The module; on "meta" it has shapes but no values until it is materialised and initialised."""
        from llm.models.decoder import Decoder

        with torch.device(device):
            model: Decoder | Wrapper = Decoder(self)
            for wrapper in self.wrappers:
                model = wrapper.wrap(model, self)
            return model

    def cost(self, seq_len: int | None = None, mode: Mode = "train", state_dtype_bytes: int = 2) -> ModelCost:
        """What the model costs at `seq_len` tokens of context (default: max_seq_len), from the config alone."""
        cost_of: CostOf = partial(self._decoder_cost, state_dtype_bytes=state_dtype_bytes)
        for wrapper in self.wrappers:
            cost_of = partial(wrapper.cost, cost_of, self, state_dtype_bytes=state_dtype_bytes)
        return cost_of(seq_len or self.max_seq_len, mode)

    def _decoder_cost(self, seq_len: int, mode: Mode, *, state_dtype_bytes: int) -> ModelCost:
        """Of the decoder without its wrappers."""
        vocab = self.required_vocab_size()
        table = vocab * self.d_model
        position = self.position.cost(self.d_model, self.max_seq_len)
        embed = Cost(params=table) + position
        if self.embed.norm is not None:
            embed = embed + self.embed.norm.cost(self.d_model)
        blocks = self.layers_cost(range(self.n_layers), seq_len, mode, state_dtype_bytes)
        own_head = (0 if self.head.tied else table) + (vocab if self.head.bias else 0)
        head = Cost(params=own_head, active_params=table, flops_per_token=2.0 * table)
        head = head + (self.final_norm or self.norm).cost(self.d_model)
        return ModelCost(embed=embed, blocks=blocks, head=head)

    def layers_cost(self, layers: range, seq_len: int, mode: Mode, state_dtype_bytes: int = 2) -> Cost:
        """Of some of the layers, by index."""
        blocks = self.blocks()
        total = Cost()
        for layer in layers:
            block = blocks[layer]
            dims = self.context(layer, block).dims(state_dtype_bytes)
            if block.mixer is not None:
                total = total + block.mixer.cost(dims, seq_len, mode)
            if block.channel is not None:
                total = total + block.channel.cost(dims, seq_len, mode)
            total = total + block.residual.cost(dims, mixer=block.mixer is not None, channel=block.channel is not None)
        return total

    def required_vocab_size(self) -> int:
        """The vocabulary size, which must be known by now."""
        if self.vocab_size is None:
            raise UserError(
                "model.vocab_size is not given and there is no tokenizer to take it from; set model.vocab_size"
            )
        return self.vocab_size


@dataclass(frozen=True)
class ModelCost:
    """Cost by part; `total` is their sum. wrappers: what they add of their own."""

    embed: Cost
    blocks: Cost
    head: Cost
    wrappers: Cost = Cost()

    @property
    def total(self) -> Cost:
        return self.embed + self.blocks + self.head + self.wrappers
