"""Block: one layer of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from llm.blocks.base import BuildCtx
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, DecodeState, EmptyState, valid_counts
from llm.models.config import BlockConfig


class Block(nn.Module):
    """mixer and channel (either may be None) around the residual stream, x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: BlockConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.mixer = config.mixer.build(ctx) if config.mixer is not None else None
        self.channel = config.channel.build(ctx) if config.channel is not None else None
        self.residual = config.residual.build(ctx, mixer=self.mixer is not None, channel=self.channel is not None)

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        """Fill what the mixer shares over layers."""
        if self.mixer is not None:
            self.mixer.prepare(seq, dtype)

    def forward(self, x: Tensor, seq: SeqInfo, state: CompositeState | None = None) -> Tensor:
        mixer, channel = self.mixer, self.channel
        if state is None:
            run_mixer = None if mixer is None else lambda y: mixer(y, seq)
            run_channel = None if channel is None else lambda y: channel(y, seq)
        else:
            run_mixer = None
            if mixer is not None:
                run = mixer.step if x.shape[1] == 1 and seq.valid is None else mixer.prefill
                run_mixer = partial(_with_state, run, seq, state["mixer"])
            run_channel = None if channel is None else lambda y: channel(y, seq, state.parts.get("channel"))
            if "none" in state.parts:
                counts = valid_counts(seq)
                state.parts["none"].advance(torch.full_like(state.length, x.shape[1]) if counts is None else counts)
        return self.residual(x, run_mixer, run_channel)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> CompositeState:
        """States of the mixer and of a stateful channel mixer."""
        parts: dict[str, DecodeState] = {}
        for name, part in (("mixer", self.mixer), ("channel", self.channel)):
            made = (
                None
                if part is None
                else part.new_state(batch, capacity, n_tentative=n_tentative, dtype=dtype, device=device)
            )
            if made is not None:
                parts[name] = made
        return CompositeState(parts or {"none": EmptyState(batch, device=device)})


def _with_state(
    run: Callable[[Tensor, SeqInfo, DecodeState], Tensor], seq: SeqInfo, state: DecodeState, x: Tensor
) -> Tensor:
    return run(x, seq, state)
