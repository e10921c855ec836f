"""What wrappers with segment recurrence share: the segments of a call, truncated gradients, curriculum, cost."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llm.config.base import Count
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.core.progress import Progress
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, SegmentState
from llm.models.output import Output
from llm.models.wrappers.base import CostOf, WrapperConfig
from llm.models.wrappers.segments import Carried, Segmented

if TYPE_CHECKING:
    from llm.models.config import ModelConfig, ModelCost


@dataclass(frozen=True)
class SegmentCost:
    """Forward FLOPs that a wrapper adds to the inner model's. Of the tokens that it reads: in the first segment and in
    later ones; and of closing the first segment and later ones, for the whole segment."""

    read_first: float = 0.0
    read_later: float = 0.0
    close_first: float = 0.0
    close_later: float = 0.0


class RecurrentConfig(WrapperConfig):
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
    def _coherent_segments(self) -> RecurrentConfig:
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

    def restarts_positions(self) -> bool:
        return self.segment is not None

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


class Recurrent(Segmented):
    """A model around `inner` whose segments go through it one after another."""

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
        return output, self.close(carried, written, first, None) if closes else carried

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        """A state whose size does not depend on the capacity, but for what `new_log` keeps."""
        segment, align = self.settings.segment, self.settings.align
        if align != "left" and segment is not None:
            raise UserError(
                f"{self.settings.type}: with align: {align} segments depend on where the sequence ends, so it cannot "
                "be decoded token by token; set align: left in model.wrappers"
            )
        return self.make_state(batch, capacity, segment, n_tentative=n_tentative, dtype=dtype, device=device)

    def new_inner(
        self, batch: int, capacity: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        longest = self.settings.inner_length(capacity)
        return self.inner.new_state(batch, longest, n_tentative=n_tentative, dtype=dtype, device=device)


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
