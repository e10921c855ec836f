"""Packers: how the documents of a store become rows of `seq_len` (input, label) pairs.

A document of L stored tokens (the last is eos) has L pairs: each token is a label once, its input is the token before
it, and that of the first token is the start token. So every token of every document is predicted exactly once an epoch,
and a document in a packed row is predicted just as it is alone.

A packer gives rows as segments: (row, document, first pair, number of pairs), rows numbered as they were asked for.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm.core.errors import UserError
from llm.data.config import DataConfig
from llm.data.permute import Permutation, key_of
from llm.data.store import TokenStore


class Segments(NamedTuple):
    """Segments in the order of rows and, within a row, of columns; four int64 arrays [n_segments]."""

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


class Packer(ABC):
    """num_rows: rows of an epoch, always the same. num_pairs: pairs of an epoch."""

    num_rows: int

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self.store, self.seq_len = store, seq_len
        self.num_pairs = store.n_tokens

    @abstractmethod
    def segments(self, epoch: int, rows: np.ndarray) -> Segments:
        """The segments of some rows [n] of an epoch, rows counted before they are shuffled."""


class ConcatPacker(Packer):
    """All documents in a stream, shuffled anew each epoch, cut every seq_len pairs.

    Where the cuts fall moves from epoch to epoch, by at most what the last row lacks.
    """

    def __init__(self, store: TokenStore, seq_len: int, *, key: int | None) -> None:
        super().__init__(store, seq_len)
        self.num_rows = -(-self.num_pairs // seq_len)
        self._key = key
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(documents in order, offsets of their pairs [n + 1], empty pairs before the first)."""
        if epoch not in self._epochs:
            n = self.store.n_documents
            order, phase = np.arange(n), 0
            if self._key is not None:
                order = Permutation(n, key_of(self._key, "documents", epoch))(order)
                phase = key_of(self._key, "phase", epoch) % (self.num_rows * self.seq_len - self.num_pairs + 1)
            offsets = np.zeros(n + 1, dtype=np.int64)
            np.cumsum(self.store.lengths[order], out=offsets[1:])
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = (order, offsets, phase)
        return self._epochs[epoch]

    def segments(self, epoch: int, rows: np.ndarray) -> Segments:
        order, offsets, phase = self._epoch(epoch)
        low = np.maximum(rows * self.seq_len - phase, 0)
        high = np.minimum((rows + 1) * self.seq_len - phase, self.num_pairs)
        first = np.searchsorted(offsets, low, side="right") - 1
        count = np.searchsorted(offsets, high, side="left") - first
        row, place = _expand(first, count)
        start = np.maximum(low[row], offsets[place])
        length = np.minimum(high[row], offsets[place + 1]) - start
        full = length > 0
        return Segments(row[full], order[place[full]], (start - offsets[place])[full], length[full])


class PadPacker(Packer):
    """One document per row; longer ones are cut every seq_len pairs and take several rows."""

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        super().__init__(store, seq_len)
        self._first_row = np.zeros(store.n_documents + 1, dtype=np.int64)
        np.cumsum(-(-store.lengths // seq_len), out=self._first_row[1:])
        self.num_rows = int(self._first_row[-1])

    def segments(self, epoch: int, rows: np.ndarray) -> Segments:
        document = np.searchsorted(self._first_row, rows, side="right") - 1
        start = (rows - self._first_row[document]) * self.seq_len
        length = np.minimum(self.store.lengths[document] - start, self.seq_len)
        return Segments(np.arange(len(rows)), document, start, length)


class BestFitPacker(Packer):
    """Documents are cut only where they are longer than a row; the pieces fill rows by best-fit decreasing (Ding et al.
    2024, "Fewer Truncations"), `window` documents at a time in an order that the key shuffles once for all epochs.

    cache: a file that keeps the rows, or None.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, *, key: int | None, window: int, cache: Path | None = None
    ) -> None:
        super().__init__(store, seq_len)
        arrays = self._load(cache)
        if arrays is None:
            arrays = self._pack(key, window)
            if cache is not None:
                self._save(cache, arrays)
        self._offsets, self._document, self._start, self._length = arrays
        self.num_rows = len(self._offsets) - 1

    def _pack(self, key: int | None, window: int) -> tuple[np.ndarray, ...]:
        n = self.store.n_documents
        order = np.arange(n) if key is None else Permutation(n, key_of(key, "documents", 0))(np.arange(n))
        counts: list[np.ndarray] = []
        pieces: list[np.ndarray] = []
        for low in range(0, n, window):
            documents = order[low : low + window]
            lengths = self.store.lengths[documents]
            owner, index = _expand(np.zeros(len(documents), dtype=np.int64), -(-lengths // self.seq_len))
            start = index * self.seq_len
            length = np.minimum(lengths[owner] - start, self.seq_len)
            row, placed = best_fit_decreasing(length, self.seq_len)
            counts.append(np.bincount(row))
            pieces.append(np.stack([documents[owner[placed]], start[placed], length[placed]]))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        document, start, length = np.concatenate(pieces, axis=1)
        return offsets, document, start, length

    def _load(self, cache: Path | None) -> tuple[np.ndarray, ...] | None:
        """The arrays of a cache file, mapped, so that processes share them; None if it is not whole."""
        if cache is None or not cache.exists():
            return None
        try:
            flat = np.load(cache, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if flat.ndim != 1 or len(flat) < 2 or not 0 < flat[0] < len(flat) or (len(flat) - 1 - flat[0]) % 3:
            return None
        offsets, rest = flat[1 : 1 + flat[0]], flat[1 + flat[0] :]
        document, start, length = rest.reshape(3, -1)
        whole = offsets[-1] == len(length) and int(length.sum()) == self.num_pairs
        return (offsets, document, start, length) if whole else None

    @staticmethod
    def _save(cache: Path, arrays: tuple[np.ndarray, ...]) -> None:
        temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
        try:
            cache.parent.mkdir(exist_ok=True)
            with open(temporary, "wb") as stream:
                np.save(stream, np.concatenate([[len(arrays[0])], *arrays]).astype(np.int64))
            os.replace(temporary, cache)
        except OSError:
            # A folder that cannot be written is no reason to stop: the rows are computed again next time.
            temporary.unlink(missing_ok=True)

    def segments(self, epoch: int, rows: np.ndarray) -> Segments:
        first = self._offsets[rows]
        row, place = _expand(first, self._offsets[rows + 1] - first)
        return Segments(row, self._document[place], self._start[place], self._length[place])


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put pieces [n] of 1..capacity into bins: the longest first, each where it leaves the least room.

    Returns (bin of each, piece), sorted by bin and then by decreasing length. Pieces of one length are placed together,
    so the work grows with the number of different lengths.
    """
    by_length = np.argsort(-lengths, kind="stable")
    sizes, first = np.unique(-lengths[by_length], return_index=True)
    groups = np.split(by_length, first[1:])
    bin_of = np.empty(len(lengths), dtype=np.int64)
    room: dict[int, np.ndarray] = {}
    open_rooms = 0
    n_bins = 0
    for size, group in zip((-sizes).tolist(), groups):
        at = 0
        while at < len(group):
            left = len(group) - at
            fitting = open_rooms >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                bins = room[space]
            else:
                space = capacity
                per_bin = capacity // size
                bins = np.arange(n_bins, n_bins - (-left // per_bin))
                n_bins += len(bins)
            per_bin = space // size
            full = min(len(bins), left // per_bin)
            take = full * per_bin
            bin_of[group[at : at + take]] = np.repeat(bins[:full], per_bin)
            _put(room, space - per_bin * size, bins[:full])
            used = full
            if full < len(bins) and (rest := min(left - take, per_bin - 1)) > 0:
                bin_of[group[at + take : at + take + rest]] = bins[full]
                _put(room, space - rest * size, bins[full : full + 1])
                take, used = take + rest, full + 1
            at += take
            if fitting:
                room[space] = bins[used:]
            open_rooms = sum(1 << r for r, held in room.items() if r and len(held))
    order = np.lexsort((-lengths, bin_of))
    return bin_of[order], order


def _put(room: dict[int, np.ndarray], space: int, bins: np.ndarray) -> None:
    if len(bins):
        room[space] = np.concatenate([room[space], bins]) if space in room else bins


def _expand(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges [first, first + count) one after another: (index of the range, value)."""
    owner = np.repeat(np.arange(len(first)), count)
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    return owner, np.arange(total) - (ends - count)[owner] + first[owner]


def make_packer(config: DataConfig, store: TokenStore, key: int | None) -> Packer:
    """The packer of a store. key: None keeps the order of the store."""
    if not store.n_tokens:
        raise UserError(f"{store.prefix} has no tokens")
    if config.packing == "concat":
        return ConcatPacker(store, config.seq_len, key=key)
    if config.packing == "pad":
        return PadPacker(store, config.seq_len)
    # Rows are shuffled by the run's seed; which documents share one need not depend on it, so runs share a cache.
    fixed = None if key is None else key_of("best fit")
    identity = repr((store.fingerprint, config.seq_len, config.best_fit_window, fixed))
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    cache = store.prefix.parent / "cache" / f"{store.prefix.name}-best-fit-{name}.npy"
    return BestFitPacker(store, config.seq_len, key=fixed, window=config.best_fit_window, cache=cache)
