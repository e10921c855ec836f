"""Keys and values in pages that rows can share: many rows that begin alike hold what they have in common once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from kernels.paged import gather_pages, scatter_tokens
from llm.core.states.attention import KVState
from llm.core.states.base import CompositeState, DecodeState
from llm.core.states.key_values import KeyValueState

LEAST_PAGES = 16
"""Fewer are not worth making anew."""


class PagePool:
    """Pages of `size` tokens: k, v [n_pages, size, Hkv, Dk or Dv], each with the number of its holders.

    like: a state without tokens, whose heads, dtype and device the pages take. Pages are made as they are needed, twice
    as many each time, and all given back when nobody holds one.
    """

    def __init__(self, size: int, like: KVState) -> None:
        self.size = size
        self.k, self.v = (t.new_zeros(0, size, *t.shape[2:]) for t in (like.k, like.v))
        self.n_holders: list[int] = []
        self._free: list[int] = []

    @property
    def n_held(self) -> int:
        """Pages that somebody holds."""
        return len(self.n_holders) - len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return sum(prod(t.shape[1:]) * t.element_size() for t in (self.k, self.v))

    def held_bytes(self) -> int:
        """Bytes of all pages that are there, free ones included."""
        return len(self.n_holders) * self.page_bytes

    def take(self) -> int:
        """A page for one holder; anything stands in it."""
        if not self._free:
            n_old = len(self.n_holders)
            n_new = max(LEAST_PAGES, n_old)
            self.k, self.v = (torch.cat([t, t.new_zeros(n_new, *t.shape[1:])]) for t in (self.k, self.v))
            self.n_holders += [0] * n_new
            self._free = list(range(n_old + n_new - 1, n_old - 1, -1))
        page = self._free.pop()
        self.n_holders[page] = 1
        return page

    def hold(self, pages: Sequence[int]) -> None:
        """One holder more of each."""
        for page in pages:
            self.n_holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less of each."""
        for page in pages:
            self.n_holders[page] -= 1
            assert self.n_holders[page] >= 0, f"page {page} is dropped by nobody who holds it"
            if not self.n_holders[page]:
                self._free.append(page)
        if pages and not self.n_held:
            self.k, self.v = self.k[:0].clone(), self.v[:0].clone()
            self.n_holders, self._free = [], []

    def copy(self, page: int) -> int:
        """A page of one's own in place of one that others hold too."""
        own = self.take()
        self.k[own], self.v[own] = self.k[page], self.v[page]
        self.drop([page])
        return own


class PagedKVState(KeyValueState):
    """Keys and values of rows in the pages of a pool, as KVState gives and takes them.

    tables: by row, its pages in order, just as many as its tokens need. A page of several holders is read only: who
    writes into it takes a copy. ends: `end()` as the host knows it, which looks at the device for it when rows take
    different numbers of tokens, and at each commit.
    """

    def __init__(self, batch: int, capacity: int, pool: PagePool) -> None:
        super().__init__(batch, capacity, device=pool.k.device)
        self.pool = pool
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.ends = [0] * batch
        self._table: Tensor | None = None

    def commit(self, accepted: Tensor) -> None:
        super().commit(accepted)
        self._set_ends(self.length.tolist())
        for row, end in enumerate(self.ends):
            n = self._n_pages(end)
            if len(self.tables[row]) > n:
                self.pool.drop(self.tables[row][n:])
                self.tables[row] = self.tables[row][:n]
                self._table = None

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        rows = index.tolist()
        self._set_tables([self.tables[row] for row in rows])
        self._set_ends([self.ends[row] for row in rows])

    def adopt(self, rows: Tensor, other: DecodeState) -> None:
        assert isinstance(other, PagedKVState) and other.pool is self.pool and other.capacity == self.capacity
        super().adopt(rows, other)
        taken = [other if theirs else self for theirs in rows.tolist()]
        self._set_tables([state.tables[row] for row, state in enumerate(taken)])
        self._set_ends([state.ends[row] for row, state in enumerate(taken)])

    def extend(self, other: DecodeState) -> None:
        assert isinstance(other, PagedKVState) and other.pool is self.pool and other.capacity == self.capacity
        assert self.n_tentative is None and other.n_tentative is None, "commit or abort before taking rows"
        self.length = torch.cat([self.length, other.length])
        self.written = torch.zeros_like(self.length)
        self._set_tables(self.tables + other.tables)
        self._set_ends(self.ends + other.ends)
        other.release()

    def share(self, rows: Sequence[Sequence[int]]) -> None:
        """Begin each row with the full pages rows[b] of the pool, in order, instead of what it has."""
        ends = [len(pages) * self.pool.size for pages in rows]
        self.length = torch.tensor(ends, dtype=torch.int64, device=self.length.device)
        self.written = torch.zeros_like(self.length)
        self._set_tables([list(pages) for pages in rows])
        self._set_ends(ends)

    def release(self) -> None:
        self._set_tables([[] for _ in self.tables])

    def held_bytes(self) -> int:
        return len({page for table in self.tables for page in table}) * self.pool.page_bytes

    def _n_pages(self, n: int) -> int:
        return -(-n // self.pool.size)

    def _set_ends(self, ends: list[int]) -> None:
        self.ends = ends
        self.extent = max(ends, default=0)

    def _set_tables(self, tables: Sequence[list[int]]) -> None:
        for table in tables:
            self.pool.hold(table)
        for table in self.tables:
            self.pool.drop(table)
        self.tables = [list(table) for table in tables]
        self._table = None

    def _storage(self) -> dict[str, Tensor]:
        return {"k": self.pool.k, "v": self.pool.v}

    def _contents(self, n: int) -> dict[str, Tensor]:
        table = self._block_table()[:, : self._n_pages(n)]
        return {name: gather_pages(pages, table, n) for name, pages in self._storage().items()}

    def _write(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        n_new, end = k.shape[1], self.end()
        taken = [n_new] * self.batch if counts is None else counts.tolist()
        self._make_room(taken)
        offsets = torch.arange(n_new, device=k.device)
        keep = None if counts is None else offsets < counts[:, None]
        if self.extent:
            for pages, x in ((self.pool.k, k), (self.pool.v, v)):
                scatter_tokens(pages, self._block_table(), end[:, None] + offsets, x, keep)
        self.advance(self._counts(n_new, counts))

    def _make_room(self, n_new: Sequence[int]) -> None:
        """Pages of its own for the next n_new[b] tokens of each row, which its end is moved behind."""
        ends = [end + n for end, n in zip(self.ends, n_new)]
        assert max(ends) <= self.capacity, f"{max(ends)} tokens in a state made for {self.capacity}"
        for table, old, new in zip(self.tables, self.ends, ends):
            if new > old and old % self.pool.size and self.pool.n_holders[table[-1]] > 1:
                table[-1] = self.pool.copy(table[-1])
                self._table = None
            for _ in range(self._n_pages(new) - len(table)):
                table.append(self.pool.take())
                self._table = None
        self._set_ends(ends)

    def _refill(self, contents: dict[str, Tensor]) -> None:
        self._set_tables([[] for _ in range(self.batch)])
        self.ends = [0] * self.batch
        self._make_room(self.length.tolist())
        slots = torch.arange(self.extent, device=self.length.device).expand(self.batch, -1)
        if self.extent:
            for name, pages in self._storage().items():
                scatter_tokens(pages, self._block_table(), slots, contents[name], slots < self.length[:, None])

    def _block_table(self) -> Tensor:
        """[B, N] int64; behind a row's last page stands page 0, which is not read for it."""
        if self._table is None:
            n = max(map(len, self.tables), default=0)
            padded = [table + [0] * (n - len(table)) for table in self.tables]
            self._table = torch.tensor(padded, dtype=torch.int64, device=self.length.device).view(self.batch, n)
        return self._table


class Pages:
    """The pools of a model's states, by where in its composite states they are."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pools: dict[str, PagePool] = {}

    def of(self, state: DecodeState, place: str = "") -> DecodeState:
        """An empty state with its keys and values in pages. States of other kinds, those inside of segments among
        them, stay as they are."""
        if isinstance(state, CompositeState):
            state.parts = {key: self.of(part, f"{place}/{key}") for key, part in state.parts.items()}
        elif type(state) is KVState:
            pool = self.pools.setdefault(place, PagePool(self.size, state))
            return PagedKVState(state.batch, state.capacity, pool)
        return state

    def held_bytes(self) -> int:
        """Bytes of all pages that are there."""
        return sum(pool.held_bytes() for pool in self.pools.values())

    def page_bytes(self) -> int:
        """Bytes of one page of each pool."""
        return sum(pool.page_bytes for pool in self.pools.values())


def leaves(state: DecodeState) -> Iterator[DecodeState]:
    """All states within composite ones."""
    if isinstance(state, CompositeState):
        for part in state.parts.values():
            yield from leaves(part)
    else:
        yield state
