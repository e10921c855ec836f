"""A decode state behind the interface of transformers' caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from llm.core.seq import next_power_of_two
from llm.core.state import DecodeState

ROOM = 256
"""Tokens for which a cache has room beyond those that it is made for."""


class ManyformerCache(Cache):
    """The decode state of a model and all that generation does with it: growing, beams, copies.

    n_columns: columns of the attention mask that were read, padding included. state: None before the first token.
    """

    def __init__(self, model: Any, max_context: int | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.model, self.max_context = model, max_context
        self.dtype, self.device = dtype, device
        self.state: DecodeState | None = None
        self.capacity = 0
        self.n_columns = 0

    def reserve(self, batch: int, n_new: int) -> DecodeState:
        """The state, with room for n_new more columns; ValueError beyond the model's table of positions."""
        wanted = self.n_columns + n_new
        if self.max_context is not None and wanted > self.max_context:
            # Padding takes columns but no positions.
            longest = 0 if self.state is None else int(self.state.end().max())
            wanted = min(wanted, longest + n_new)
            if wanted > self.max_context:
                raise ValueError(
                    f"{wanted} tokens are more than this model's table of {self.max_context} positions; generate less"
                )
        if self.state is None:
            self._make(batch, wanted)
        assert self.state is not None
        if self.state.batch != batch:
            raise ValueError(f"the cache holds {self.state.batch} sequences, {batch} were given; use a new cache")
        if wanted > self.capacity:
            held = self.state.export()
            self._make(batch, wanted)
            self.state.restore(held)
        return self.state

    def _make(self, batch: int, wanted: int) -> None:
        self.capacity = next_power_of_two(wanted + ROOM)
        if self.max_context is not None:
            self.capacity = min(self.capacity, self.max_context)
        self.state = self.model.new_state(batch, self.capacity, dtype=self.dtype, device=self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> ManyformerCache:
        copy = ManyformerCache(self.model, self.max_context, self.dtype, self.device)
        if self.state is not None:
            copy._make(self.state.batch, max(1, self.capacity - ROOM))
            assert copy.state is not None
            copy.state.restore(self.state.export())
            copy.n_columns = self.n_columns
        return copy

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n_columns} columns, room for {self.capacity})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read."""
        return self.n_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, since it grows."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes a copy of row beam_idx[b]."""
        if self.state is not None:
            self.state.reorder(beam_idx.to(self.state.end().device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(self.state.batch, device=self.state.end().device)
            self.state.reorder(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.capacity, self.n_columns = None, 0, 0

    def crop(self, *lengths: int) -> None:
        raise ValueError("this model's state cannot be cut back; use Manyformer's own speculative decoding")

    def update(self, *arguments: Any, **keys: Any) -> Any:
        raise ValueError("this cache is written by the model itself")

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]
