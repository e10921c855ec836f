"""What wrappers with segment recurrence share: the segments of a call, truncated gradients, curriculum, decoding."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm.blocks.base import Caps
from llm.config.base import Count
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.core.progress import Progress
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, SegmentState
from llm.core.states.base import take_along
from llm.core.states.segment import Piece
from llm.models.output import Output
from llm.models.wrappers.base import CostOf, Wrapper, WrapperConfig

if TYPE_CHECKING:
    from llm.models.config import ModelConfig, ModelCost

Carried = dict[str, Tensor]


@dataclass(frozen=True)
class SegmentCost:
    """Forward FLOPs that a wrapper adds to the inner model's. Of the tokens that it reads: in the first segment and in
    later ones; and of closing the first segment and later ones, for the whole segment."""

    read_first: float = 0.0
    read_later: float = 0.0
    close_first: float = 0.0
    close_later: float = 0.0


class SegmentConfig(WrapperConfig):
    """Fields of every segment-recurrent wrapper.

    segment: tokens of a segment; None: the whole sequence is one. n_memory: memory tokens.
    align: where the shorter segment of a sequence stands: "left" puts it last; "right" first; "center" makes all of
    about the same length. Only "left" is known before the sequence ends, so only that decodes.
    bptt_segments: gradients of a loss reach at most so many segments, its own included: what is carried is detached
    every so many segments, counted from the last one (None: never). checkpoint_segments: keep only what is carried
    between segments for the backward pass and compute each segment again.
    curriculum: while training, what is carried is forgotten every so many segments, counted from the last one; the
    stages of the list take equal shares of the run. sample_segments: a number between 1 and the stage's is drawn for
    each step.
    """

    segment: Count | None = Field(None, ge=1)
    n_memory: int = Field(ge=0)
    align: Literal["left", "right", "center"] = "left"
    bptt_segments: int | None = Field(None, ge=1)
    checkpoint_segments: bool = False
    curriculum: list[int] = []
    sample_segments: bool = False

    @model_validator(mode="after")
    def _coherent_segments(self) -> SegmentConfig:
        if any(n < 1 for n in self.curriculum):
            raise UserError(f"{self.type}: curriculum {self.curriculum} must hold numbers of segments, each at least 1")
        if self.sample_segments and not self.curriculum:
            raise UserError(f"{self.type}: sample_segments draws from a curriculum; give one, such as curriculum: [8]")
        return self

    def shape(self) -> tuple[int, int]:
        """(lead, tail): memory tokens that the inner model reads before and after a segment."""
        raise NotImplementedError

    def added(self, model: ModelConfig, state_dtype_bytes: int, seq_len: int) -> tuple[Cost, SegmentCost]:
        """(parameters and state bytes, FLOPs) that come on top of the inner model's."""
        raise NotImplementedError

    def inner_length(self, seq_len: int) -> int:
        """Most tokens that the inner model reads of one segment, in a sequence of seq_len tokens."""
        lead, tail = self.shape()
        segment = self.segment or seq_len
        return lead + min(segment, seq_len) + (tail if seq_len > segment else 0)

    def cost(self, inner: CostOf, model: ModelConfig, seq_len: int, mode: Mode, *, state_dtype_bytes: int) -> ModelCost:
        """Decoding is that of the token after `seq_len` earlier ones: the first of a segment also closes the last."""
        own, extra = self.added(model, state_dtype_bytes, seq_len)
        bare = inner(max(1, self.inner_length(seq_len)), mode)
        context = 0.0
        if mode == "decode":
            flops = self._decode_flops(inner, seq_len, extra)
        else:
            flops, context = self._sequence_flops(inner, seq_len, mode, extra)
        blocks = replace(
            bare.blocks,
            flops_per_token=flops,
            attention_flops=context,
            state_bytes_per_seq=bare.blocks.state_bytes_per_seq + bare.wrappers.state_bytes_per_seq,
        )
        inside = Cost(bare.wrappers.params, bare.wrappers.active_params)
        return replace(bare, blocks=blocks, wrappers=inside + own)

    def _sequence_flops(self, inner: CostOf, seq_len: int, mode: Mode, extra: SegmentCost) -> tuple[float, float]:
        """(FLOPs per token, the part that depends on the context) of a whole sequence."""
        lead, tail = self.shape()
        segment = min(self.segment or seq_len, seq_len)
        n_closed = -(-seq_len // segment) - 1
        last = lead + seq_len - n_closed * segment
        at_last = _running(inner(last, mode))
        if not n_closed:
            return at_last.flops_per_token * last / seq_len + extra.read_first, at_last.attention_flops * last / seq_len
        full = lead + segment + tail
        total = n_closed * full * _running(inner(full, mode)).flops_per_token + last * at_last.flops_per_token
        total += full * (extra.read_first + (n_closed - 1) * extra.read_later) + last * extra.read_later
        total += extra.close_first + (n_closed - 1) * extra.close_later
        return total / seq_len, 0.0

    def _decode_flops(self, inner: CostOf, seq_len: int, extra: SegmentCost) -> float:
        lead, tail = self.shape()
        segment = self.segment or sys.maxsize
        index = max(0, seq_len - 1) // segment
        used = seq_len - index * segment
        read = extra.read_later if index else extra.read_first
        if 0 < used < segment:
            return _running(inner(lead + used, "decode")).flops_per_token + read
        flops = _tokens(inner, 0, lead + 1)
        if not seq_len:
            return flops + (lead + 1) * extra.read_first
        flops += _tokens(inner, lead + segment, tail) + tail * read + (lead + 1) * extra.read_later
        return flops + (extra.close_later if index else extra.close_first)


def _running(cost: ModelCost) -> Cost:
    return cost.blocks + cost.wrappers


def _tokens(inner: CostOf, start: int, count: int) -> float:
    """FLOPs of `count` tokens read after `start` others."""
    if not count:
        return 0.0
    ends = (_running(inner(at, "decode")).flops_per_token for at in (start, start + count - 1))
    return count * sum(ends) / 2


@dataclass(frozen=True)
class Carry:
    """What goes from one call of a segment-recurrent model to the next. started: some segment has been read."""

    carried: Carried
    started: bool = False


class Segmented(Wrapper):
    """A model around `inner` that reads a sequence segment by segment. A subclass says what is carried from one to the
    next (`start`, `close`), what of it the inner model reads before and after a segment (`lead`, `tail`), and how a
    segment is read (`read`)."""

    caps: ClassVar[Caps] = Caps(packing=False)

    def __init__(self, config: Any, inner: Any, model: ModelConfig) -> None:
        super().__init__(inner)
        self.settings = config
        self.n_lead, self.n_tail = config.shape()
        self.n_training_segments: int | None = None
        longest = config.inner_length(model.max_seq_len)
        if model.position.type == "learned" and longest > model.max_seq_len:
            raise UserError(
                f"{config.type}: a segment with its memory has {longest} tokens, more than model.max_seq_len "
                f"{model.max_seq_len} learned positions; lower segment or n_memory"
            )

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

    def close(
        self, carried: Carried, written: Any, first: Tensor | bool, state: SegmentState | None, rows: Tensor | None
    ) -> Carried:
        """What the next segment is given. rows [B] bool: those that close; others may get anything."""
        raise NotImplementedError

    def before_step(self, progress: Progress) -> None:
        """Take the number of segments that training lets depend on one another from the curriculum."""
        stages = self.settings.curriculum
        if not stages:
            return
        stage = stages[min(int(progress.fraction * len(stages)), len(stages) - 1)]
        if self.settings.sample_segments:
            stage = random.Random(f"segments:{progress.seed}:{progress.step}").randint(1, stage)
        self.n_training_segments = stage

    def start_carry(self, batch: int) -> Carry:
        """To be given as `carry` to the first of several calls that go on from one another."""
        return Carry(self.start(batch, next(self.parameters())))

    def edges(self, length: int) -> list[int]:
        """Where the segments of a sequence begin, and its length."""
        segment, align = self.settings.segment or length, self.settings.align
        if align == "center":
            segment = -(-length // -(-length // segment))
        first = (length - 1) % segment + 1 if align == "right" else segment
        return [0, *range(first, length, segment), length]

    def forward(self, tokens: Tensor, seq: SeqInfo, *, state: DecodeState | None = None, carry: Any = None) -> Output:
        """With a carry, the sequence goes on where the last call ended, and the output holds the next carry."""
        if seq.packed:
            raise UserError(
                f"{self.settings.type} cannot keep documents that share a row apart: its segments would not begin with "
                "them; set data.packing=pad, or data.isolate=false"
            )
        x = tokens if tokens.is_floating_point() else self.inner.embed(tokens)
        if state is not None:
            assert isinstance(state, SegmentState)
            return Output(self._decode(x, seq, state), carry)
        return self._sequence(x, carry)

    def _sequence(self, x: Tensor, carry: Carry | None) -> Output:
        batch, length = x.shape[:2]
        edges = self.edges(length)
        if carry is not None and any((b - a) != (self.settings.segment or b - a) for a, b in zip(edges, edges[1:])):
            raise UserError(
                f"{self.settings.type}: a call of {length} tokens that others go on from must consist of whole "
                f"segments of {self.settings.segment}"
            )
        n = len(edges) - 1
        here = carry if carry is not None else Carry(self.start(batch, x))
        outputs: list[Output] = []
        shared: dict[int, SeqInfo] = {}
        for index in range(n):
            if index and self._every(self.n_training_segments, n - index):
                here = Carry(self.start(batch, x))
            elif index and self._every(self.settings.bptt_segments, n - index):
                here = Carry({name: tensor.detach() for name, tensor in here.carried.items()}, here.started)
            goes_on = carry is not None if index == n - 1 else not self._every(self.n_training_segments, n - index - 1)
            run = partial(self._segment, closes=goes_on, shared=shared)
            if self.settings.checkpoint_segments and torch.is_grad_enabled():
                run = partial(checkpoint, run, use_reentrant=False)
            output, carried = run(x[:, edges[index] : edges[index + 1]], here.carried, not here.started)
            outputs.append(output)
            here = Carry(carried, True)
        return _joined(outputs, here if carry is not None else None)

    def _every(self, period: int | None, left: int) -> bool:
        """While training, whether a segment with `left` segments to go, its own included, begins a new period."""
        return self.training and period is not None and left % period == 0

    def _segment(
        self, x: Tensor, carried: Carried, first: bool, *, closes: bool, shared: dict[int, SeqInfo]
    ) -> tuple[Output, Carried]:
        """One segment [B, n, D]: (output of its tokens, what the next one is given)."""
        lead, tail = self.lead(carried), self.tail(carried) if closes else None
        parts = [part.to(x.dtype) if part is not None else None for part in (lead, x, tail)]
        given = [part for part in parts if part is not None]
        joined = torch.cat(given, dim=1) if len(given) > 1 else x
        batch, length = joined.shape[:2]
        if length not in shared:
            shared[length] = SeqInfo.contiguous(batch, length, device=x.device)
        at = slice(length - self.n_tail, length) if closes else None
        output, written = self.read(joined, shared[length], None, carried, first, at)
        keep = slice(self.n_lead, self.n_lead + x.shape[1])
        if joined is not x:
            output = replace(
                output, hidden=output.hidden[:, keep], extra=tuple((h[:, keep], w) for h, w in output.extra)
            )
        return output, self.close(carried, written, first, None, None) if closes else carried

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
            positions = lane.inner.end()[:, None] + torch.arange(joined.shape[1], device=x.device)
            closing = torch.tensor(piece.closes, device=x.device) if any(piece.closes) else None
            at = None if closing is None else self._tail_places(piece, x.device)
            first = _of_all([index == 0 for index in piece.index], x.device)
            written = None
            if joined.shape[1]:
                inner_seq = SeqInfo(positions=positions, valid=valid)
                output, written = self.read(joined, inner_seq, lane.inner, lane.carried, first, at)
                here, there = source
                hidden[here] = output.hidden[there].to(hidden.dtype)
            carried = None if closing is None else self.close(lane.carried, written, first, state, closing)
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

    def make_log(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """(state that takes entries from every closed segment or None, how many from each)."""
        return None, 0

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        """A state whose size does not depend on the capacity, but for what `make_log` keeps."""
        if self.settings.align != "left" and self.settings.segment is not None:
            raise UserError(
                f"{self.settings.type}: with align: {self.settings.align} segments depend on where the sequence ends, "
                "so it cannot be decoded token by token; set align: left in model.wrappers"
            )
        longest = capacity + n_tentative
        segment = self.settings.segment or longest
        tentative = SegmentState.inner_tentative(n_tentative, segment, self.n_lead, self.n_tail)

        def inner_state(rows: int) -> DecodeState:
            return self.inner.new_state(
                rows, self.settings.inner_length(longest), n_tentative=tentative, dtype=dtype, device=device
            )

        log, log_step = self.make_log(batch, longest, dtype=dtype, device=device)
        like = torch.empty(0, dtype=dtype, device=device)
        with torch.no_grad():
            carried = {name: tensor.detach().clone() for name, tensor in self.start(batch, like).items()}
        return SegmentState(
            batch,
            inner_state,
            carried,
            segment=segment,
            n_lead=self.n_lead,
            n_tail=self.n_tail,
            log=log,
            log_step=log_step,
            n_tentative=n_tentative,
            device=device,
        )


def pick(x: Tensor, at: Any) -> Tensor:
    """Tokens of x [B, L, D] at a slice, or at places [B, n]."""
    return x[:, at] if isinstance(at, slice) else take_along(x, at.clamp(max=x.shape[1] - 1))


def _of_all(flags: list[bool], device: torch.device) -> Tensor | bool:
    return flags[0] if len(set(flags)) == 1 else torch.tensor(flags, device=device)


def _joined(outputs: list[Output], carry: Carry | None) -> Output:
    """Outputs of segments, one after another."""
    if len(outputs) == 1:
        return replace(outputs[0], carry=carry)
    hidden = torch.cat([output.hidden for output in outputs], dim=1)
    extra = tuple(
        (torch.cat([hidden for hidden, _ in same], dim=1), same[0][1])
        for same in zip(*(output.extra for output in outputs))
    )
    return Output(hidden, carry, outputs[0].weight, extra)
