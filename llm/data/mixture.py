"""Mixture: which source the i-th row comes from, as a pure function of i.

Source s with share p_s gives its j-th row at time (j + 1/2) / p_s; rows are taken in the order of time, so after any
number of rows each source is within a few rows of its share. A source that has reached its limit drops out and the
others' shares grow; the stretches between such moments are phases, computed at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm.core.errors import UserError

_BLOCK = 4096


@dataclass(frozen=True)
class _Phase:
    """start: first row of the phase. shares [n_sources], 0 for sources that are used up. given: rows given before."""

    start: int
    shares: np.ndarray
    given: np.ndarray


class Mixture:
    """shares: [n_sources] share of rows of each source. limits: [n_sources] rows of each at most, None: no limit."""

    def __init__(self, shares: list[float], limits: list[int | None]) -> None:
        assert len(shares) == len(limits) and all(share > 0 for share in shares)
        self._limits = limits
        self._n = len(shares)
        base = np.array(shares, dtype=np.float64)
        self.phases = self._plan(base / base.sum())
        self._blocks: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def total(self) -> int | None:
        """Rows of the whole mixture, None when it has no end."""
        return None if any(limit is None for limit in self._limits) else sum(limit or 0 for limit in self._limits)

    def _plan(self, shares: np.ndarray) -> list[_Phase]:
        left = [np.inf if limit is None else float(limit) for limit in self._limits]
        given = np.zeros(self._n, dtype=np.int64)
        phases: list[_Phase] = []
        start = 0
        active = [s for s in range(self._n) if left[s] > 0]
        while active:
            current = np.zeros(self._n)
            current[active] = shares[active] / shares[active].sum()
            phases.append(_Phase(start, current, given.copy()))
            ends = {s: (left[s] - given[s] - 0.5) / current[s] for s in active if np.isfinite(left[s])}
            if not ends:
                break
            time, last = min((time, s) for s, time in ends.items())
            counts = np.array([_before(current[s], time, s <= last) if s in active else 0 for s in range(self._n)])
            counts[last] = int(left[last]) - given[last]
            given = given + counts
            start += int(counts.sum())
            active = [s for s in active if given[s] < left[s]]
        return phases

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of that source) of the global rows `indices`, int64 arrays of their shape.

        Raises UserError beyond the last row, when every source has reached its max_epochs.
        """
        indices = np.asarray(indices, dtype=np.int64)
        total = self.total
        if total is not None and indices.size and int(indices.max()) >= total:
            raise UserError(
                f"the data are used up: every source has reached its max_epochs after {total} rows; "
                "raise max_epochs, add sources or train for fewer tokens"
            )
        source, row = np.empty_like(indices), np.empty_like(indices)
        starts = np.array([phase.start for phase in self.phases])
        phase_of = np.searchsorted(starts, indices, side="right") - 1
        block_of = (indices - starts[phase_of]) // _BLOCK
        for phase, block in {*zip(phase_of.tolist(), block_of.tolist())}:
            here = (phase_of == phase) & (block_of == block)
            sources, rows = self._block(phase, block)
            local = indices[here] - starts[phase] - block * _BLOCK
            source[here], row[here] = sources[local], rows[local]
        return source, row

    def _block(self, number: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        if (number, block) not in self._blocks:
            phase = self.phases[number]
            low, high = block * _BLOCK, (block + 1) * _BLOCK
            firsts, parts = 0, []
            for s in np.flatnonzero(phase.shares):
                share = phase.shares[s]
                first = max(0, _before(share, low - self._n - 1, False))
                last = _before(share, high + self._n + 1, True)
                count = np.arange(first, last)
                parts.append((count, (count + 0.5) / share, np.full(len(count), s)))
                firsts += first
            counts, times, sources = (np.concatenate(part) for part in zip(*parts))
            order = np.lexsort((sources, times))[low - firsts : high - firsts]
            while len(self._blocks) > 7:
                del self._blocks[next(iter(self._blocks))]
            chosen = sources[order]
            self._blocks[number, block] = (chosen, counts[order] + phase.given[chosen])
        return self._blocks[number, block]


def _before(share: float, time: float, with_ties: bool) -> int:
    """Number of rows j with (j + 1/2) / share below `time`, or equal to it where ties count."""
    count = max(0, int(np.floor(time * share + 0.5)))
    while count and not _earlier((count - 1 + 0.5) / share, time, with_ties):
        count -= 1
    while _earlier((count + 0.5) / share, time, with_ties):
        count += 1
    return count


def _earlier(time: float, than: float, with_ties: bool) -> bool:
    return time <= than if with_ties else time < than


def row_shares(weights: list[float], pairs: list[int], rows: list[int], documents: list[int], unit: str) -> list[float]:
    """Shares of rows that give each source its weight's share of tokens, or of documents.

    weights, pairs, rows, documents: of each source; the last three count one epoch.
    """
    if unit == "tokens":
        return [w * r / p for w, p, r in zip(weights, pairs, rows)]
    return [w * r / d for w, r, d in zip(weights, rows, documents)]
