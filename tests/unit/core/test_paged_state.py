"""Paged keys and values: what is shared, what is copied, and what is given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm.core.state import CompositeState, EmptyState, KVState, PagedKVState, Pages, WindowState

OPEN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def made(pages: Pages, batch: int, capacity: int = 40) -> PagedKVState:
    state = pages.of(KVState(batch, capacity, 2, 3, 5, **OPEN))
    assert isinstance(state, PagedKVState)
    return state


def tokens(batch: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, 2, 3, generator=generator), torch.randn(batch, n, 2, 5, generator=generator)


def test_rows_share_pages_until_one_writes() -> None:
    pages = Pages(4)
    state = made(pages, 1)
    state.append(*tokens(1, 10))
    pool = state.pool
    state.reorder(torch.tensor([0, 0, 0]))
    assert (pool.n_held, pool.n_holders[:3]) == (3, [3, 3, 3])
    before = state.held_bytes()
    state.append(*tokens(3, 1, seed=1))
    assert pool.n_held == 5, "the two full pages are shared, of the third each row has its own"
    assert [table[:2] for table in state.tables] == [state.tables[0][:2]] * 3
    assert state.held_bytes() == before // 3 * 5 == 5 * 4 * 2 * (3 + 5) * 4
    state.append(*tokens(3, 2, seed=2))
    assert pool.n_held == 8
    state.reorder(torch.tensor([2]))
    assert pool.n_held == 4
    state.release()
    assert (pool.n_held, pool.held_bytes()) == (0, 0)


def test_rejected_tokens_give_their_pages_back() -> None:
    state = made(Pages(4), 2)
    state.append(*tokens(2, 3))
    state.begin(9)
    state.append(*tokens(2, 9, seed=1))
    assert state.pool.n_held == 6
    state.commit(torch.tensor([1, 2]))
    assert ([len(table) for table in state.tables], state.pool.n_held) == ([1, 2], 3)


def test_joining_copies_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(4)
    one, other = made(pages, 2), made(pages, 1)
    one.append(*tokens(2, 7))
    other.append(*tokens(1, 9, seed=1))
    wanted = [one.export()["k"][0, :7], one.export()["k"][1, :7], other.export()["k"][0, :9]]
    storage = (one.pool.k.data_ptr(), one.pool.v.data_ptr())
    tables = one.tables + other.tables
    one.extend(other)
    assert (one.pool.k.data_ptr(), one.pool.v.data_ptr(), one.tables) == (*storage, tables)
    assert [t for table in other.tables for t in table] == []
    got = one.export()
    assert got["length"].tolist() == [7, 7, 9]
    assert all(torch.equal(got["k"][row, : len(k)], k) for row, k in enumerate(wanted))


def test_a_row_goes_on_from_the_pages_of_another() -> None:
    pages = Pages(4)
    first, second = made(pages, 1), made(pages, 2)
    k, v = tokens(1, 11)
    first.append(k, v)
    second.share([first.tables[0][:2], []])
    first.release()
    assert (second.pool.n_held, second.length.tolist(), second.extent) == (2, [8, 0], 8)
    more = tokens(2, 3, seed=1)
    keys, values, _ = second.append(*more)
    assert torch.equal(keys[0], torch.cat([k[0, :8], more[0][0]])) and torch.equal(keys[1, :3], more[0][1])
    assert torch.equal(values[0], torch.cat([v[0, :8], more[1][0]]))


def test_other_kinds_stay_as_they_are() -> None:
    window, empty = WindowState(1, 4, 1, 1, **OPEN), EmptyState(1)
    state = Pages(4).of(
        CompositeState({"a": CompositeState({"b": KVState(1, 8, 1, 1, **OPEN), "c": window}), "d": empty})
    )
    assert isinstance(state, CompositeState)
    inner = state["a"]
    assert isinstance(inner, CompositeState)
    assert isinstance(inner["b"], PagedKVState)
    assert (inner["c"], state["d"]) == (window, empty)


def test_more_tokens_than_there_is_room_for() -> None:
    state = made(Pages(4), 1, capacity=6)
    state.append(*tokens(1, 4))
    with pytest.raises(AssertionError, match="7 tokens in a state made for 6"):
        state.append(*tokens(1, 3))
