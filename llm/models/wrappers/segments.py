"""Decoding segment by segment, for wrappers whose models read a sequence in segments or groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llm.blocks.base import Caps
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, SegmentState
from llm.core.states.base import take_along
from llm.core.states.segment import Piece
from llm.models.output import Output
from llm.models.wrappers.base import Wrapper

Carried = dict[str, Tensor]


@dataclass(frozen=True)
class Closing:
    """Rows [B] bool that close their segment, the segment index of each row, the inner state of that segment, and the
    state to which closed segments add."""

    rows: Tensor
    index: list[int]
    inner: DecodeState
    log: DecodeState | None


class Segmented(Wrapper):
    """A model around `inner` that reads a sequence segment by segment. A subclass says what is carried from one to the
    next (`start`, `close`), what of it the inner model reads before and after a segment (`lead`, `tail`), and how a
    segment is read (`read`).

    n_lead, n_tail: tokens that `lead` and `tail` give."""

    caps: ClassVar[Caps] = Caps(packing=False)
    n_lead = 0
    n_tail = 0

    def start(self, batch: int, like: Tensor) -> Carried:
        """What the first segment of `batch` rows is given, each tensor [B, ...]; `like` has the dtype and device."""
        raise NotImplementedError

    def lead(self, carried: Carried) -> Tensor | None:
        """Embeddings [B, n_lead, D] that stand before a segment."""
        return None

    def tail(self, carried: Carried) -> Tensor | None:
        """Embeddings [B, n_tail, D] that stand behind a segment that is followed by another."""
        return None

    def read(
        self, x: Tensor, seq: SeqInfo, state: DecodeState | None, carried: Carried, first: Tensor | bool, at: Any
    ) -> tuple[Output, Any]:
        """Run x [B, L, D]. at: where the tail stands, as `pick` takes it, or None. first: whether this is the first
        segment, of all rows or [B]. Returns (output, what `close` wants to know of the tail)."""
        raise NotImplementedError

    def close(self, carried: Carried, written: Any, first: Tensor | bool, closing: Closing | None) -> Carried:
        """What the next segment is given. closing: while decoding, what else there is; rows that do not close may get
        anything."""
        raise NotImplementedError

    def _decode(self, x: Tensor, seq: SeqInfo, state: SegmentState) -> Tensor:
        """Hidden states [B, T, D] of x after the tokens in `state`, piece by piece."""
        batch, length = x.shape[:2]
        counts = [length] * batch if seq.valid is None else seq.valid.sum(dim=1).tolist()
        taken = [0] * batch
        hidden = torch.zeros_like(x)
        while any(done < count for done, count in zip(taken, counts)):
            piece = state.next_piece(taken, counts)
            lane = state.lanes[piece.lane]
            joined, valid, source = self._gather(x, lane.carried, piece)
            ends = lane.inner.end()[:, None]
            positions = ends + torch.arange(joined.shape[1], device=x.device)
            if valid is not None:
                # Positions of padding would otherwise go on beyond the segment, for which a table may have no rows.
                positions = torch.minimum(positions, (ends + valid.sum(dim=1, keepdim=True) - 1).clamp(min=0))
            closes = any(piece.closes)
            at = self._tail_places(piece, x.device) if closes else None
            first = _of_all([index == 0 for index in piece.index], x.device)
            written = None
            if joined.shape[1]:
                inner_seq = SeqInfo(positions=positions, valid=valid)
                output, written = self.read(joined, inner_seq, lane.inner, lane.carried, first, at)
                here, there = source
                hidden[here] = output.hidden[there].to(hidden.dtype)
            carried = None
            if closes:
                rows = torch.tensor(piece.closes, device=x.device)
                closing = Closing(rows, piece.index, lane.inner, state.log)
                carried = self.close(lane.carried, written, first, closing)
            state.finish(piece, carried)
            taken = [done + count for done, count in zip(taken, piece.count)]
        return hidden

    def _gather(self, x: Tensor, carried: Carried, piece: Piece) -> tuple[Tensor, Tensor | None, tuple[Any, Any]]:
        """(what the inner model reads [B, L, D], which of it is real (None: all), where the tokens' hidden states go
        and where they come from, as indices)."""
        lead = self.lead(carried) if any(piece.lead) else None
        tail = self.tail(carried) if any(piece.closes) else None
        given = [part for part in (lead, x, tail) if part is not None]
        if piece.together:
            start, count = piece.start[0], piece.count[0]
            parts = [x[:, start : start + count] if part is x else part.to(x.dtype) for part in given]
            skip = self.n_lead if lead is not None else 0
            source = (slice(None), slice(start, start + count)), (slice(None), slice(skip, skip + count))
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None, source
        pool = torch.cat([part.to(x.dtype) for part in given], dim=1)
        first_token = self.n_lead if lead is not None else 0
        first_tail = first_token + x.shape[1]
        index: list[list[int]] = []
        places: list[tuple[int, int, int]] = []
        for number, (leads, start, count, closes) in enumerate(zip(piece.lead, piece.start, piece.count, piece.closes)):
            mine = list(range(self.n_lead)) if leads else []
            places += [(number, start + i, len(mine) + i) for i in range(count)]
            mine += range(first_token + start, first_token + start + count)
            index.append(mine + (list(range(first_tail, first_tail + self.n_tail)) if closes else []))
        longest = max(len(mine) for mine in index)
        valid = torch.tensor([[i < len(mine) for i in range(longest)] for mine in index], device=x.device)
        padded = [mine + [0] * (longest - len(mine)) for mine in index]
        filled = torch.tensor(padded, dtype=torch.int64, device=x.device)
        row, to, come = torch.tensor(places, dtype=torch.int64, device=x.device).reshape(-1, 3).unbind(1)
        return take_along(pool, filled), valid, ((row, to), (row, come))

    def _tail_places(self, piece: Piece, device: torch.device) -> Tensor:
        """[B, n_tail] where each row's tail stands in what the inner model reads; anything for rows without one."""
        starts = [
            (self.n_lead if lead else 0) + count if closes else 0
            for lead, count, closes in zip(piece.lead, piece.count, piece.closes)
        ]
        return torch.tensor(starts, device=device)[:, None] + torch.arange(self.n_tail, device=device)

    def make_state(
        self,
        batch: int,
        capacity: int,
        segment: int | None,
        *,
        n_tentative: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> SegmentState:
        """A state for segments of `segment` tokens (None: all in one)."""
        longest = capacity + n_tentative
        segment = segment or longest
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        tentative = SegmentState.inner_tentative(n_tentative, segment, self.n_lead, self.n_tail)
        with torch.no_grad():
            log, log_step = self.new_log(batch, longest, **options)
            carried = {name: tensor.detach().clone() for name, tensor in self.new_carried(batch, **options).items()}
        return SegmentState(
            batch,
            lambda rows: self.new_inner(rows, longest, n_tentative=tentative, **options),
            carried,
            segment=segment,
            n_lead=self.n_lead,
            n_tail=self.n_tail,
            log=log,
            log_step=log_step,
            n_tentative=n_tentative,
            device=device,
        )

    def new_carried(self, batch: int, *, dtype: torch.dtype, device: torch.device | str) -> Carried:
        """What the first segment of a decode state is given."""
        return self.start(batch, torch.empty(0, dtype=dtype, device=device))

    def new_inner(
        self, batch: int, capacity: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        """An empty state of one segment, in a sequence of at most `capacity` tokens."""
        raise NotImplementedError

    def new_log(
        self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[DecodeState | None, int]:
        """(state that takes entries from every closed segment, how many from each)."""
        return None, 0


def pick(x: Tensor, at: Any) -> Tensor:
    """Tokens of x [B, L, D] at a slice, or at places [B, n]."""
    return x[:, at] if isinstance(at, slice) else take_along(x, at.clamp(max=x.shape[1] - 1))


def _of_all(flags: list[bool], device: torch.device) -> Tensor | bool:
    return flags[0] if len(set(flags)) == 1 else torch.tensor(flags, device=device)
