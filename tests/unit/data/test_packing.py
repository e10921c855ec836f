"""Packers: every token is a label exactly once an epoch, and documents stay whole where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.config import DataConfig
from llm.data.packing import BestFitPacker, Packer, best_fit_decreasing, make_packer
from llm.data.store import TokenStore, write_store

PACKINGS = ["concat", "best_fit", "pad"]


def make_store(folder: Path, lengths: list[int]) -> TokenStore:
    write_store(folder / "s", [np.arange(n) for n in lengths], 100)
    return TokenStore(folder / "s")


def packer_of(store: TokenStore, packing: str, seq_len: int, key: int | None) -> Packer:
    changes: dict[str, Any] = {"best_fit_window": 7} if packing == "best_fit" else {}
    return make_packer(DataConfig(path="x", seq_len=seq_len, packing=packing, **changes), store, key)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    seq_len=st.integers(1, 30),
    packing=st.sampled_from(PACKINGS),
    key=st.one_of(st.none(), st.integers(0, 1000)),
    epoch=st.integers(0, 3),
)
def test_every_pair_once(
    tmp_path_factory: Any, lengths: list[int], seq_len: int, packing: str, key: int | None, epoch: int
) -> None:
    store = make_store(tmp_path_factory.mktemp("p"), lengths)
    packer = packer_of(store, packing, seq_len, key)
    found = packer.segments(epoch, np.arange(packer.num_rows))
    assert (np.diff(found.row) >= 0).all() and (found.length > 0).all()
    assert np.bincount(found.row, weights=found.length).max() <= seq_len
    pairs = sorted(
        (int(d), int(s) + i) for d, s, n in zip(found.document, found.start, found.length) for i in range(int(n))
    )
    assert pairs == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    asked = np.arange(packer.num_rows)[::-1]
    backwards = packer.segments(epoch, asked)
    rows = {row: [] for row in asked.tolist()}  # type: ignore[var-annotated]
    for r, *rest in zip(*backwards):
        rows[int(asked[r])].append(tuple(map(int, rest)))
    forwards = {row: [] for row in asked.tolist()}  # type: ignore[var-annotated]
    for r, *rest in zip(*found):
        forwards[int(r)].append(tuple(map(int, rest)))
    assert rows == forwards
    if packing != "concat":
        cut = {int(d) for d, s in zip(found.document, found.start) if s}
        assert all(lengths[d] > seq_len for d in cut)
    if packing == "pad":
        assert len(found.row) == packer.num_rows


def test_concat_keeps_the_order_of_the_store_without_a_key(tmp_path: Path) -> None:
    packer = packer_of(make_store(tmp_path, [3, 4, 5]), "concat", 5, None)
    assert [tuple(map(int, s)) for s in zip(*packer.segments(0, np.arange(3)))] == [
        (0, 0, 0, 3),
        (0, 1, 0, 2),
        (1, 1, 2, 2),
        (1, 2, 0, 3),
        (2, 2, 3, 2),
    ]


def test_epochs_differ(tmp_path: Path) -> None:
    packer = packer_of(make_store(tmp_path, [3] * 20), "concat", 8, 5)
    orders = [tuple(packer.segments(epoch, np.arange(8)).document.tolist()) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(packer.segments(0, np.arange(8)).document.tolist())


def test_one_document_is_cut_elsewhere_each_epoch(tmp_path: Path) -> None:
    packer = packer_of(make_store(tmp_path, [81]), "concat", 16, 5)
    firsts = {int(packer.segments(epoch, np.arange(1)).length[0]) for epoch in range(30)}
    assert len(firsts) > 5


@settings(max_examples=150)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), capacity=st.integers(20, 25))
def test_best_fit_decreasing_equals_the_plain_algorithm(lengths: list[int], capacity: int) -> None:
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= size]
        if fits:
            rooms[rooms.index(min(fits))] -= size
        else:
            rooms.append(capacity - size)
    bins, pieces = best_fit_decreasing(np.array(lengths), capacity)
    assert sorted(pieces.tolist()) == list(range(len(lengths)))
    used = np.bincount(bins, weights=np.array(lengths)[pieces])
    assert sorted(used.tolist()) == sorted(float(capacity - room) for room in rooms)


def test_best_fit_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, [3, 9, 14, 2, 2, 31])
    first = packer_of(store, "best_fit", 10, 1)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(BestFitPacker, "_pack", lambda *_: pytest.fail("not read from the cache"))
    again = packer_of(store, "best_fit", 10, 1)
    assert [a.tolist() for a in first.segments(0, np.arange(5))] == [
        a.tolist() for a in again.segments(0, np.arange(5))
    ]
    monkeypatch.undo()
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert packer_of(store, "best_fit", 10, 1).num_rows == first.num_rows


def test_best_fit_fills_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = make_store(tmp_path, rng.integers(1, 90, size=2000).tolist())
    packer = packer_of(store, "best_fit", 100, 0)
    wide = make_packer(DataConfig(path="x", seq_len=100, packing="best_fit"), store, 0)
    assert store.n_tokens / (wide.num_rows * 100) > 0.98
    assert packer.num_rows > wide.num_rows
