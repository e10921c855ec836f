"""States of attention: all keys and values, or those of a sliding window."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm.core.compat import mark_any_length
from llm.core.states.base import DecodeState, fetch, own_copy, spread, take_along
from llm.core.states.key_values import KeyValueState

LEAST_SLOTS = 64
"""Fewer are not worth making anew."""

READ_TOGETHER = 16
"""Compiled code reads slots in multiples of this number."""


class KVState(KeyValueState):
    """All keys and values of a row side by side: k, v [B, slots, Hkv, Dk or Dv].

    Slots are made as they are needed, a power of two of them, and `reorder` gives back what the rows that are left do
    not need.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        n_kv_heads: int,
        d_key: int,
        d_value: int | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, capacity, device=device)
        # Slots that compiled code reads, [n] int64: it may know a size from a tensor, but not from a number.
        self.reserved: Tensor | None = None
        self.k = torch.zeros(batch, 0, n_kv_heads, d_key, dtype=dtype, device=device)
        self.v = torch.zeros(batch, 0, n_kv_heads, d_value or d_key, dtype=dtype, device=device)

    def _write(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        if self.batch == 1 and counts is None and k.device.type == "cpu" and not torch.compiler.is_compiling():
            self._append_to_one(k, v)
            return
        real = self._counts(k.shape[1], counts)
        rows, slots, keep, extent = self._places(k.shape[1], real)
        self.k[rows, slots] = (k if keep is None else k[keep]).to(self.k.dtype)
        self.v[rows, slots] = (v if keep is None else v[keep]).to(self.v.dtype)
        self.advance(real)
        self.extent = extent

    def _seen_places(self) -> Tensor:
        if torch.compiler.is_compiling() and self.reserved is not None:
            return self.reserved
        return super()._seen_places()

    def _append_to_one(self, k: Tensor, v: Tensor) -> None:
        """The same for a state of one row on a CPU, where looking at its length costs nothing."""
        start = int(self.end())
        self.extent = start + k.shape[1]
        assert self.extent <= self.capacity, f"{self.extent} tokens in a state made for {self.capacity}"
        self._make_slots(self.extent)
        self.k[:, start : self.extent] = k
        self.v[:, start : self.extent] = v
        self.advance(torch.tensor([k.shape[1]]))

    def _places(self, n_new: int, real: Tensor) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Where the next n_new tokens of each row go, of which real [B] count: (rows, slots, which of [B, n_new], None:
        all, the extent behind them). There are slots for them."""
        offsets = torch.arange(n_new, device=real.device)
        slots = self.end()[:, None] + offsets
        rows = torch.arange(self.batch, device=real.device)[:, None].expand_as(slots)
        extent = self.extent + n_new
        if extent <= self.capacity:
            self._make_slots(extent)
            return rows, slots, None, extent
        # The bound may be loose, and padding behind the real tokens may not fit: look at the device.
        extent = int((self.end() + real).max())
        assert extent <= self.capacity, f"{extent} tokens in a state made for {self.capacity}"
        self._make_slots(extent)
        keep = offsets < real[:, None]
        return rows[keep], slots[keep], keep, extent

    def _n_slots(self, n: int) -> int:
        """Slots that are made for n tokens."""
        return min(self.capacity, max(LEAST_SLOTS, 1 << (n - 1).bit_length())) if n else 0

    def _make_slots(self, n: int) -> None:
        if n > self.k.shape[1]:
            missing = self._n_slots(n) - self.k.shape[1]
            for name, tensor in self._rows().items():
                self._set_row(name, torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1))

    def reserve(self, n_new: int) -> None:
        needed = self.extent + n_new
        n = min(-(-needed // READ_TOGETHER) * READ_TOGETHER, self.capacity)
        # One slot more: two sizes that are equal by chance would be compiled for as equal ones.
        self._make_slots(min(n + 1, self.capacity))
        if self.reserved is None or self.reserved.shape[0] != n:
            self.reserved = torch.arange(n, device=self.k.device)
            mark_any_length(self.reserved)

    def commit(self, accepted: Tensor) -> None:
        super().commit(accepted)
        # Without this the bound would grow by every rejected token; whoever commits has read the tokens anyway.
        self.extent = int(self.length.max()) if self.batch else 0

    def reorder(self, index: Tensor) -> None:
        self.extent = int(self.end()[index].max()) if len(index) else 0
        n = self._n_slots(self.extent)
        if n < self.k.shape[1]:
            for name, tensor in self._rows().items():
                self._set_row(name, tensor[:, :n])
        super().reorder(index)

    def adopt(self, rows: Tensor, other: DecodeState) -> None:
        assert isinstance(other, KVState) and other.capacity == self.capacity
        n = max(self.k.shape[1], other.k.shape[1])
        self._make_slots(n)
        other._make_slots(n)
        super().adopt(rows, other)
        self.extent = int(self.length.max()) if self.batch else 0

    def held_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._rows().values())

    def _storage(self) -> dict[str, Tensor]:
        return self._rows()

    def _contents(self, n: int) -> dict[str, Tensor]:
        return {name: tensor[:, :n] for name, tensor in self._rows().items()}

    def _refill(self, contents: dict[str, Tensor]) -> None:
        for name, stored in contents.items():
            filled = stored.new_zeros(self.batch, self._n_slots(self.extent), *stored.shape[2:])
            filled[:, : self.extent] = stored
            self._set_row(name, filled)

    def _rows(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}


class WindowState(DecodeState):
    """Keys and values of a sliding window with sinks, in constant memory.

    k, v [B, n_sinks + ring, Hkv, Dk or Dv], ring = window + n_tentative: token p < n_sinks stands in slot p, any other
    in slot n_sinks + (p - n_sinks) % ring. A tentative token overwrites only what lies outside the window of every
    query that can still come, also after it has been rejected.
    """

    def __init__(
        self,
        batch: int,
        window: int,
        n_kv_heads: int,
        d_key: int,
        d_value: int | None = None,
        *,
        n_sinks: int = 0,
        n_tentative: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, device=device, max_tentative=n_tentative)
        assert window >= 1 and n_sinks >= 0 and n_tentative >= 0
        self.window = window
        self.n_sinks = n_sinks
        self.ring = window + n_tentative
        slots = n_sinks + self.ring
        self.arrangement = f"{n_sinks} and a ring of {self.ring}"
        self.k = torch.zeros(batch, slots, n_kv_heads, d_key, dtype=dtype, device=device)
        self.v = torch.zeros(batch, slots, n_kv_heads, d_value or d_key, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v [B, T, Hkv, D] behind each row's end; of row b only the first counts[b] tokens are real.

        Returns (k [B, S, Hkv, D], v, positions [B, S] int64) with all that the T queries may need: the old contents
        and the whole chunk, however long. Positions are not sorted; an empty slot has -1. The caller masks: a query at
        q sees a key at p where 0 <= p <= q and (q - p < window or p < n_sinks). Padding of the chunk stands behind the
        row's last real token, hence no real query sees it.
        """
        n_new = k.shape[1]
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)
        if n_new == 1 and counts is None:
            rows = torch.arange(self.batch, device=k.device)
            slot = self._slot(self.end())
            self.k[rows, slot], self.v[rows, slot] = k[:, 0], v[:, 0]
            self.advance(torch.ones_like(self.length))
            return self.k, self.v, self._positions(self.end())
        counts = self._counts(n_new, counts)
        start = self.end()
        chunk_positions = start[:, None] + torch.arange(n_new, device=k.device)
        seen = (
            torch.cat([self.k, k], dim=1),
            torch.cat([self.v, v], dim=1),
            torch.cat([self._positions(start), chunk_positions], dim=1),
        )
        self.advance(counts)
        index = self._newest(self.end()) - start[:, None]
        fresh = index >= 0
        index = index.clamp(0, n_new - 1)
        for name, old, new in (("k", self.k, k), ("v", self.v, v)):
            self._set_row(name, torch.where(spread(fresh, old), take_along(new, index), old))
        return seen

    def export(self) -> dict[str, Tensor]:
        """Sinks, then the last `window` tokens in order: [B, n_sinks + window, Hkv, D], zero where there is none."""
        assert self.n_tentative is None, "commit or abort before an export"
        wanted = self._window_positions()
        held = (wanted >= 0) & (wanted < self.length[:, None])
        slot = self._slot(wanted.clamp(min=0))
        parts = {name: torch.where(spread(held, t), take_along(t, slot), 0) for name, t in self._rows().items()}
        return {"length": self.length.clone(), **{name: own_copy(part) for name, part in parts.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._restore_length(tensors)
        position = self._positions(self.length)
        # Where a slot's token stands in the export: a sink at its own place, another counted from the window's start.
        index = torch.where(
            position < self.n_sinks, position, position - (self.length[:, None] - self.window) + self.n_sinks
        )
        for name, tensor in self._rows().items():
            stored = fetch(tensors, name, (self.n_sinks + self.window, *tensor.shape[2:])).to(tensor)
            taken = take_along(stored, index.clamp(min=0))
            self._set_row(name, torch.where(spread(position >= 0, taken), taken, 0))

    def _window_positions(self) -> Tensor:
        """[B, n_sinks + window] positions of the export's entries; -1 where an entry has none."""
        sinks = torch.arange(self.n_sinks, device=self.length.device).expand(self.batch, -1)
        recent = self.length[:, None] - self.window + torch.arange(self.window, device=self.length.device)
        return torch.cat([sinks, torch.where(recent >= self.n_sinks, recent, -1)], dim=1)

    def _slot(self, position: Tensor) -> Tensor:
        """Where a token stands."""
        ring = self.n_sinks + (position - self.n_sinks) % self.ring
        return torch.where(position < self.n_sinks, position, ring)

    def _newest(self, end: Tensor) -> Tensor:
        """[B, slots] the last position before `end` [B] that falls on each slot; -1 where there is none."""
        slot = torch.arange(self.n_sinks + self.ring, device=end.device)
        laps = torch.div(end[:, None] - 1 - slot, self.ring, rounding_mode="floor")
        newest = torch.where(slot < self.n_sinks, slot, slot + laps * self.ring)
        return torch.where((newest >= slot) & (newest < end[:, None]), newest, -1)

    def _positions(self, end: Tensor) -> Tensor:
        """[B, slots] positions of what the slots hold; -1 for those that no query at end - 1 or later may see."""
        newest = self._newest(end)
        visible = (end[:, None] - 1 - newest < self.window) | (newest < self.n_sinks)
        return torch.where(visible, newest, -1)

    def _rows(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}
