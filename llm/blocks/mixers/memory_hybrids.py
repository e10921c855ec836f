"""A test-time memory beside sliding-window attention (as gate) or in front of it (as layer): Titans' MAG and MAL."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.mixers.attention import Attention, AttentionConfig
from llm.blocks.mixers.test_time_memory import MemoryConfig, MemoryMixer
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, DecodeState


def _tiny_memory(**keys: Any) -> MemoryConfig:
    return MemoryConfig.model_validate({"preset": "titans", "n_heads": 2, "chunk": 4, "expansion": 1} | keys)


def _tiny_attention(n_persistent: int = 0) -> AttentionConfig:
    return AttentionConfig(n_heads=2, window=5, n_persistent=n_persistent)


class HybridConfig(MixerConfig):
    """memory: its settings; with ns_granularity: chunk the window of attention must cover a chunk, since tokens do not
    read their own chunk from the memory. attention: its settings, with a window; its n_persistent are the papers'
    persistent tokens."""

    memory: MemoryConfig
    attention: AttentionConfig
    project: ClassVar[bool] = True

    @model_validator(mode="after")
    def _window_covers_chunk(self) -> HybridConfig:
        window = self.attention.window
        if window is None:
            raise UserError(f"{self.type_name}: attention needs a window, or the memory has nothing to do; set one")
        if self.memory.ns_granularity == "chunk" and window < self.memory.chunk:
            raise UserError(
                f"{self.type_name}: with ns_granularity: chunk attention must see the whole chunk: window {window} is "
                f"less than chunk {self.memory.chunk}; raise window or lower chunk"
            )
        if not self.attention.out_proj:
            raise UserError(f"{self.type_name}: attention.out_proj is not for hybrids; remove it")
        return self

    def inner_attention(self) -> AttentionConfig:
        """Attention as it is built."""
        return self.attention if self.project else self.attention.replace(out_proj=False, out_bias=None)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        memory = self.memory.cost(dims, seq_len, mode, project=self.project)
        return memory + self.inner_attention().cost(dims, seq_len, mode) + self.join_cost(dims)

    def join_cost(self, dims: Dims) -> Cost:
        """Of what joins the two."""
        raise NotImplementedError


class Hybrid(TokenMixer):
    """memory and attention, each with a state of its own."""

    caps = Caps(rollback="replay", needs_positions=True)

    def __init__(self, config: HybridConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.memory = MemoryMixer(config.memory, ctx, project=config.project)
        self.attention = Attention(config.inner_attention(), ctx)

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        self.attention.prepare(seq, dtype)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        known: dict[str, Any] = {"n_tentative": n_tentative, "dtype": dtype, "device": device}
        parts = {"memory": self.memory, "attention": self.attention}
        return CompositeState({name: part.new_state(batch, capacity, **known) for name, part in parts.items()})


@MIXERS.register(
    "memory_as_gate",
    tiny=lambda: MemoryAsGateConfig(memory=_tiny_memory(), attention=_tiny_attention(n_persistent=2)),
    tinies={
        "atlas": lambda: MemoryAsGateConfig(
            memory=_tiny_memory(preset="atlas", phi="id", window=2, ns_granularity="chunk", ns_steps=2, d_head=16),
            attention=_tiny_attention(),
        )
    },
    paper="arXiv:2501.00663",
    status="experimental",
    about=About(
        equation="y = W_o (norm(SWA(x)) ⊙ σ(norm(M(x)))): attention over a window and persistent tokens, gated by "
        "a test-time memory",
        use="Exact recall of what is near, and a constant state for what is far; the hybrid that did best in ATLAS.",
        weakness="Two mixers cost what two mixers cost, and what the memory says can only shrink what attention says.",
    ),
)
class MemoryAsGateConfig(HybridConfig):
    """Attention gated by a memory (MAG). Both are d_model wide."""

    project: ClassVar[bool] = False

    def build(self, ctx: BuildCtx) -> TokenMixer:
        self.memory.must_fill(ctx.d_model, self.type_name)
        return MemoryAsGate(self, ctx)

    def join_cost(self, dims: Dims) -> Cost:
        d = dims.d_model
        norms = dims.norm(d, role="mixer.attention_norm") + dims.norm(d, role="mixer.memory_norm")
        return norms + dims.linear(d, d, role="mixer.out")


class MemoryAsGate(Hybrid):
    """attention_norm, memory_norm [D], out [D -> D]."""

    def __init__(self, config: MemoryAsGateConfig, ctx: BuildCtx) -> None:
        super().__init__(config, ctx)
        self.attention_norm = ctx.norm(ctx.d_model, role="mixer.attention_norm")
        self.memory_norm = ctx.norm(ctx.d_model, role="mixer.memory_norm")
        self.out = ctx.linear(ctx.d_model, ctx.d_model, role="mixer.out")

    def _join(self, near: Tensor, far: Tensor) -> Tensor:
        return self.out(self.attention_norm(near) * torch.sigmoid(self.memory_norm(far)))

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self._join(self.attention(x, seq), self.memory(x, seq))

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        near = self.attention.prefill(x, seq, state["attention"])
        return self._join(near, self.memory.prefill(x, seq, state["memory"]))


@MIXERS.register(
    "memory_as_layer",
    tiny=lambda: MemoryAsLayerConfig(memory=_tiny_memory(opt="gd"), attention=_tiny_attention(n_persistent=2)),
    paper="arXiv:2501.00663",
    status="experimental",
    about=About(
        equation="y = SWA(norm(M(x))): a test-time memory, then attention over a window of what it says",
        use="The sequential hybrid of the papers, to compare with memory_as_gate.",
        weakness="The weakest of the three hybrids in both papers: attention sees the input through the memory alone.",
    ),
)
class MemoryAsLayerConfig(HybridConfig):
    """A memory in front of attention (MAL)."""

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return MemoryAsLayer(self, ctx)

    def join_cost(self, dims: Dims) -> Cost:
        return dims.norm(dims.d_model, role="mixer.memory_norm")


class MemoryAsLayer(Hybrid):
    """memory_norm [D] between the two."""

    def __init__(self, config: HybridConfig, ctx: BuildCtx) -> None:
        super().__init__(config, ctx)
        self.memory_norm = ctx.norm(ctx.d_model, role="mixer.memory_norm")

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self.attention(self.memory_norm(self.memory(x, seq)), seq)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        far = self.memory_norm(self.memory.prefill(x, seq, state["memory"]))
        return self.attention.prefill(far, seq, state["attention"])
