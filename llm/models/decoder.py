"""Decoder: embedding, blocks, final norm and head, each apart so that loss, parallelism and export can reach them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import CrossEntropy, CrossEntropyForm, linear_cross_entropy
from llm.blocks.base import linear_init
from llm.blocks.linears.dense import linear
from llm.blocks.linears.packed import Packed
from llm.core.batch import IGNORE
from llm.core.init import Init, constant, init_specs
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, DecodeState
from llm.models.block import Block
from llm.models.config import ModelConfig
from llm.models.output import Output


class DecoderLike(Protocol):
    """What a bare decoder and every wrapper offer, hence wrappers nest."""

    @property
    def config(self) -> ModelConfig: ...
    def __call__(
        self, tokens: Tensor, seq: SeqInfo, *, state: DecodeState | None = None, carry: Any = None
    ) -> Output: ...
    def head(self, hidden: Tensor) -> Tensor: ...
    def cross_entropy(self, hidden: Tensor, labels: Tensor, *, z_loss: float, chunk: int | None) -> CrossEntropy: ...
    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState: ...
    def blocks(self) -> Iterator[tuple[str, nn.Module]]: ...


class Decoder(nn.Module):
    """Causal decoder. `tokens` are ids [B, T] int64 or ready embeddings [B, T, D] (as a vision encoder makes them)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config)
        ctx = config.context(0)
        self.position = config.position.build(ctx)
        self.layers = nn.ModuleList(Block(block, config.context(i, block)) for i, block in enumerate(config.blocks()))
        self.final_norm = (config.final_norm or config.norm).build(config.d_model)
        self.unembed = OutputHead(config)
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding matrix where the config says so; to be repeated after materialisation."""
        if self.config.head.tied:
            self.unembed.weight = self.embed.weight

    def is_tied(self) -> bool:
        """Whether the storage is shared now."""
        return self.unembed.weight is self.embed.weight

    def forward(self, tokens: Tensor, seq: SeqInfo, *, state: DecodeState | None = None, carry: Any = None) -> Output:
        x = self.run(self.enter(tokens, seq), seq, state)
        return Output(hidden=self.final_norm(x), carry=carry)

    def enter(self, tokens: Tensor, seq: SeqInfo) -> Tensor:
        """What goes into the first layer, [B, T, D]: embeddings with their positions."""
        x = self.embed(tokens) if not tokens.is_floating_point() else tokens
        x = self.position.at_embed(x, seq)
        return F.dropout(x, self.config.dropout, self.training)

    def run(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None, layers: range | None = None) -> Tensor:
        """The layers (all, or some) in order, [B, T, D] -> [B, T, D]; `state` holds those of these layers by index."""
        chosen = [(index, self.layers[index]) for index in (range(len(self.layers)) if layers is None else layers)]
        for _, block in chosen:
            block.prepare(seq, x.dtype)  # type: ignore[operator]
        if state is None:
            for _, block in chosen:
                x = block(x, seq)
            return x
        assert isinstance(state, CompositeState)
        for index, block in chosen:
            x = block(x, seq, state[str(index)])
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.unembed(hidden)

    def cross_entropy(
        self, hidden: Tensor, labels: Tensor, *, z_loss: float = 0.0, chunk: int | None = None
    ) -> CrossEntropy:
        """Loss of hidden [N, D] against labels [N] without holding all logits; `total` alone carries gradients."""
        return self.unembed(hidden, labels, z_loss=z_loss, chunk=chunk)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> CompositeState:
        """An empty decode state for `batch` rows of at most `capacity` tokens."""
        return CompositeState(
            {
                str(index): block.new_state(  # type: ignore[operator]
                    batch, capacity, n_tentative=n_tentative, dtype=dtype, device=device
                )
                for index, block in enumerate(self.layers)
            }
        )

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(dotted name, block) in order, for checkpointing, compilation and sharding."""
        for index, block in enumerate(self.layers):
            yield f"layers.{index}", block

    def init_names(self) -> list[str]:
        """Names of all parameters and buffers, each once."""
        return list(dict.fromkeys(name for name, _, _ in init_specs(self)))


class TokenEmbedding(nn.Module):
    """weight [V, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.required_vocab_size(), config.d_model))
        self.scale = config.embed.scale
        self.norm = config.embed.norm.build(config.d_model) if config.embed.norm is not None else None
        std = config.embed.std if config.embed.std is not None else config.init.std
        self.init = linear_init(std if std is not None else config.d_model**-0.5, config.init)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.weight)
        if self.scale != 1.0:
            x = x * self.scale
        return self.norm(x) if self.norm is not None else x

    def init_spec(self) -> dict[str, Init]:
        return {"weight": self.init}


class OutputHead(nn.Module):
    """weight [V, D], which is the embedding's when tied; logits in the dtype of the hidden states. packed: a copy of
    the weight for a few rows on a CPU."""

    packed: Packed | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vocab, d_model = config.required_vocab_size(), config.d_model
        self.weight = nn.Parameter(torch.empty(vocab, d_model))
        self.bias = nn.Parameter(torch.empty(vocab)) if config.head.bias else None
        self.softcap = config.head.softcap
        std = config.init.std if config.init.std is not None else d_model**-0.5
        self.init = linear_init(std, config.init)

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, *, z_loss: float = 0.0, chunk: int | None = None
    ) -> Tensor | CrossEntropy:
        """Logits, or with labels the loss. One entrance for both, since sharding gathers weights around this call."""
        if labels is not None:
            form = CrossEntropyForm(ignore_index=IGNORE, z_loss=z_loss, softcap=self.softcap, chunk=chunk)
            return linear_cross_entropy(hidden, self.weight, labels, form, bias=self.bias)
        logits = None
        if self.packed is not None:
            logits = self.packed.linear(hidden, self.weight, self.bias, [self.weight])
        if logits is None:
            logits = linear(hidden, self.weight, self.bias)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap is not None else logits

    def init_spec(self) -> dict[str, Init]:
        return {"weight": self.init, "bias": constant(0.0)}
