"""State of a model that reads a sequence in segments and carries a memory of fixed size from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.core.states.base import DecodeState, fetch, own_copy, spread


@dataclass
class Lane:
    """A segment in progress, row by row: what the inner model remembers of it, and what came from the one before."""

    inner: DecodeState
    carried: dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """What one call of the inner model reads, in one lane: of row b its lead tokens if lead[b], then count[b] tokens
    of the call from start[b] on, then its tail tokens if closes[b]. index[b]: the segment in which the row stands."""

    lane: int
    lead: list[bool]
    start: list[int]
    count: list[int]
    closes: list[bool]
    index: list[int]

    @property
    def together(self) -> bool:
        """Whether all rows read alike."""
        return all(len(set(values)) <= 1 for values in (self.lead, self.start, self.count, self.closes))


class SegmentState(DecodeState):
    """Segments of `segment` tokens. To the inner model a segment is n_lead tokens with what was carried over, the
    tokens themselves, and n_tail tokens from which the next memory is taken. A segment is closed by the first token
    that does not fit any more, so a row of e tokens stands in segment (e - 1) // segment.

    lanes: outside of a transaction one. Inside, rows whose tentative tokens pass a segment's end go on in a further
    lane, while the old one stays until it is known how many are accepted: drafts may cross any number of ends.
    log: a state that takes log_step entries from every closed segment, such as keys of past memories.
    make_inner(batch): an empty inner state, for transactions of `inner_tentative` tokens.
    """

    def __init__(
        self,
        batch: int,
        make_inner: Callable[[int], DecodeState],
        carried: dict[str, Tensor],
        *,
        segment: int,
        n_lead: int = 0,
        n_tail: int = 0,
        log: DecodeState | None = None,
        log_step: int = 0,
        n_tentative: int = 0,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, device=device, max_tentative=n_tentative)
        self.segment, self.n_lead, self.n_tail = segment, n_lead, n_tail
        self.make_inner = make_inner
        self.log, self.log_step = log, log_step
        self.lanes = [Lane(make_inner(batch), carried)]
        # Kept on the host too: which rows pass a segment's end decides what is run.
        self._ends = [0] * batch
        self._index = [0] * batch
        self._before: tuple[list[int], list[int]] = ([], [])

    @staticmethod
    def inner_tentative(n: int, segment: int, n_lead: int, n_tail: int) -> int:
        """Tokens of the inner model that a transaction of n tokens may write in one lane."""
        return n_lead + min(n, segment) + n_tail if n else 0

    def room(self) -> Tensor:
        """[B] tokens that still fit into each row's segment. More may be drafted; the next segment then begins
        tentatively, in a further lane."""
        room = [(index + 1) * self.segment - end for end, index in zip(self._ends, self._index)]
        return torch.tensor(room, dtype=torch.int64, device=self.length.device)

    def next_piece(self, taken: list[int], counts: list[int]) -> Piece:
        """What to run next, when taken[b] of the counts[b] tokens of a call have been; some row has tokens left."""
        left = [count - done for count, done in zip(counts, taken)]
        lanes = [0] * self.batch
        if self.n_tentative is not None:
            lanes = [index - first for index, first in zip(self._index, self._before[1])]
        lane = min(number for number, n in zip(lanes, left) if n)
        here = [number == lane and n > 0 for number, n in zip(lanes, left)]
        used = [end - index * self.segment for end, index in zip(self._ends, self._index)]
        count = [min(n, self.segment - u) if now else 0 for now, n, u in zip(here, left, used)]
        return Piece(
            lane=lane,
            lead=[now and u == 0 for now, u in zip(here, used)],
            start=list(taken),
            count=count,
            closes=[now and n > c for now, n, c in zip(here, left, count)],
            index=list(self._index),
        )

    def finish(self, piece: Piece, carried: dict[str, Tensor] | None) -> None:
        """A piece has been run. carried: what rows that close take into their next segment; other rows are ignored."""
        self.advance(torch.tensor(piece.count, dtype=torch.int64, device=self.length.device))
        self._ends = [end + count for end, count in zip(self._ends, piece.count)]
        if not any(piece.closes):
            return
        assert carried is not None
        self._index = [index + closes for index, closes in zip(self._index, piece.closes)]
        if piece.lane + 1 == len(self.lanes):
            self.lanes.append(Lane(self.make_inner(self.batch), carried))
            if self.n_tentative is not None:
                self._begin_lane(self.lanes[-1], self.n_tentative)
        else:
            follower = self.lanes[piece.lane + 1]
            follower.carried = self._select(piece.closes, carried, follower.carried)
        if self.n_tentative is None:
            self._merge([int(closes) for closes in piece.closes])

    def _begin_lane(self, lane: Lane, n: int) -> None:
        lane.inner.begin(self.inner_tentative(n, self.segment, self.n_lead, self.n_tail))

    def _select(self, rows: list[bool], chosen: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = torch.tensor(rows, device=self.length.device)
        return {name: torch.where(spread(mask, old), chosen[name].to(old.dtype), old) for name, old in others.items()}

    def _merge(self, lanes: list[int]) -> None:
        """Back to one lane: row b as it is in lane lanes[b]."""
        if len(set(lanes)) == 1:
            self.lanes = [self.lanes[lanes[0]]]
            return
        first = self.lanes[0]
        for number, lane in enumerate(self.lanes[1:], start=1):
            rows = [chosen == number for chosen in lanes]
            first.inner.adopt(torch.tensor(rows, device=self.length.device), lane.inner)
            first.carried = self._select(rows, lane.carried, first.carried)
        self.lanes = [first]

    def _held(self, end: int) -> int:
        """Tokens that the inner model holds of the segment in which a row of `end` tokens stands."""
        used = end - self._segment_of(end) * self.segment
        return used + self.n_lead if used else 0

    def _segment_of(self, end: int) -> int:
        return max(0, end - 1) // self.segment

    def begin(self, n: int) -> None:
        super().begin(n)
        self._before = (list(self._ends), list(self._index))
        self._begin_lane(self.lanes[0], n)
        if self.log is not None:
            self.log.begin(self.log_step * (1 + n // self.segment))

    def commit(self, accepted: Tensor) -> None:
        super().commit(accepted)
        ends, index = self._before
        self._ends = [end + int(kept) for end, kept in zip(ends, accepted.tolist())]
        self._index = [self._segment_of(end) for end in self._ends]
        lanes = [now - then for now, then in zip(self._index, index)]
        for number, lane in enumerate(self.lanes):
            kept = [
                self._held(now) - (0 if number else self._held(then)) if chosen == number else 0
                for chosen, now, then in zip(lanes, self._ends, ends)
            ]
            lane.inner.commit(torch.tensor(kept, dtype=torch.int64, device=self.length.device))
        if self.log is not None:
            counts = torch.tensor(lanes, dtype=torch.int64, device=self.length.device)
            self.log.commit(self.log_step * counts)
        self._merge(lanes)

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        rows = index.tolist()
        for lane in self.lanes:
            lane.inner.reorder(index)
            lane.carried = {name: tensor[index] for name, tensor in lane.carried.items()}
        if self.log is not None:
            self.log.reorder(index)
        self._ends, self._index = [self._ends[row] for row in rows], [self._index[row] for row in rows]
        if self.n_tentative is not None:
            ends, first = self._before
            self._before = ([ends[row] for row in rows], [first[row] for row in rows])

    def adopt(self, rows: Tensor, other: DecodeState) -> None:
        assert isinstance(other, SegmentState)
        super().adopt(rows, other)
        mine, theirs = self.lanes[0], other.lanes[0]
        mine.inner.adopt(rows, theirs.inner)
        mine.carried = self._select(rows.tolist(), theirs.carried, mine.carried)
        if self.log is not None:
            assert other.log is not None
            self.log.adopt(rows, other.log)
        self._ends = [new if taken else old for taken, new, old in zip(rows.tolist(), other._ends, self._ends)]
        self._index = [self._segment_of(end) for end in self._ends]

    def nbytes(self) -> int:
        return self._carried_bytes() + sum(state.nbytes() for state in self._states())

    def held_bytes(self) -> int:
        return self._carried_bytes() + sum(state.held_bytes() for state in self._states())

    def _states(self) -> list[DecodeState]:
        return [lane.inner for lane in self.lanes] + ([] if self.log is None else [self.log])

    def _carried_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for lane in self.lanes for t in lane.carried.values())

    def export(self) -> dict[str, Tensor]:
        tensors = super().export()
        (lane,) = self.lanes
        parts = {"inner": lane.inner.export(), "carried": {name: own_copy(t) for name, t in lane.carried.items()}}
        if self.log is not None:
            parts["log"] = self.log.export()
        return tensors | {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self._ends = self.length.tolist()
        self._index = [self._segment_of(end) for end in self._ends]

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}

        (lane,) = self.lanes
        lane.inner.restore(part("inner"))
        stored = part("carried")
        lane.carried = {
            name: own_copy(fetch(stored, name, tuple(old.shape[1:])).to(old)) for name, old in lane.carried.items()
        }
        if self.log is not None:
            self.log.restore(part("log"))
