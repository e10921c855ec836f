"""Sequence description: the positions and document boundaries that travel with a batch to every mixer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llm.core.compat import mark_any_length


@dataclass(frozen=True, eq=False)
class SeqInfo:
    """Where each token stands. B rows of T tokens.

    positions: [B, T] int64, restarts at 0 with each document; with a decode state it goes on from the state's length.
    cu_seqlens: [D+1] int32 offsets of the D documents in the flattened B*T tokens; None: each row is one document.
    max_seqlen: host bound on a document's length, a power of two, so that compiled code sees few values.
    valid: [B, T] bool, ragged prefill only: padding on the right is False and must not advance any state. Positions
        simply go on over it, so that its outputs, which nobody reads, stay finite.
    shard: set by context parallelism alone.
    derived: what mixers compute once per forward from the above and share over layers (rotary tables, masks), by key.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    valid: Tensor | None = None
    shard: Any = None
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.cu_seqlens is not None:
            mark_any_length(self.cu_seqlens)

    @property
    def packed(self) -> bool:
        """True when a row may hold several documents, which must not see one another."""
        return self.cu_seqlens is not None

    def document_ids(self) -> Tensor:
        """[B, T] int64: the index of a token's document within its row, counted from the starts (position 0)."""
        return (self.positions == 0).long().cumsum(dim=1)

    def starts(self) -> Tensor:
        """[B, T] bool: True at the first token of each document; where a recurrence must be reset."""
        return self.positions == 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SeqInfo:
        """The same description with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=non_blocking)
            for name, value in (("positions", self.positions), ("cu_seqlens", self.cu_seqlens), ("valid", self.valid))
        }
        return replace(self, **moved, derived={})

    @staticmethod
    def contiguous(batch: int, length: int, *, start: Tensor | int = 0, device: torch.device | str = "cpu") -> SeqInfo:
        """One document per row, positions counted from `start` (an int or [B])."""
        offset = torch.as_tensor(start, device=device).reshape(-1, 1)
        positions = torch.arange(length, device=device).expand(batch, length) + offset
        return SeqInfo(positions=positions)

    @staticmethod
    def from_lengths(lengths: list[list[int]], length: int, *, device: torch.device | str = "cpu") -> SeqInfo:
        """Packed rows: `lengths[b]` are the document lengths of row b, and each row must sum to `length`."""
        positions = torch.empty(len(lengths), length, dtype=torch.int64)
        offsets = [0]
        for row, row_lengths in enumerate(lengths):
            if sum(row_lengths) != length:
                raise ValueError(f"row {row} has documents of {sum(row_lengths)} tokens in all, expected {length}")
            positions[row] = torch.cat([torch.arange(n) for n in row_lengths])
            for n in row_lengths:
                offsets.append(offsets[-1] + n)
        longest = max(n for row_lengths in lengths for n in row_lengths)
        return SeqInfo(
            positions=positions.to(device),
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
            max_seqlen=next_power_of_two(longest),
        )


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
