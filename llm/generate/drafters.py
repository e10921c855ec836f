"""Drafters of speculative decoding: text that came before, a part of the model itself, or a smaller model.

Rows are those of the running batch. The pending token of a row is the last of its output, which no state has read yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.core.errors import UserError
from llm.core.state import DecodeState
from llm.generate.decode_step import CompiledStep, PlainStep, Step
from llm.generate.prefill import prefill
from llm.generate.sampling import Sampler, Sampling
from llm.models.decoder import DecoderLike


class Draft(NamedTuple):
    """tokens [B, N], of row b the first counts[b]; q [B, N, V] what they were drawn from, None: nobody drew them.

    A tree of drafts, without q, has several branches for a row, each written out from its first token on: tokens
    [R, N], counts [R], and rows [R], in order, of which every row of the batch has at least one.
    """

    tokens: Tensor
    counts: Tensor
    q: Tensor | None = None
    rows: Tensor | None = None


class Batch(NamedTuple):
    """New rows: what they continue and how, of at most `capacity` tokens each; drafts have at most `most`."""

    prompts: Sequence[Sequence[int]]
    samplings: Sequence[Sampling]
    capacity: int
    most: int


class Drafter(Protocol):
    """Proposes tokens for the rows of a batch, which come and go. vocab_size None: that of the model."""

    name: str
    vocab_size: int | None

    def check(self, n_tokens: int) -> None:
        """UserError when it cannot draft for a prompt and output of so many tokens."""

    def start(self, batch: Batch, pending: Tensor) -> None:
        """A new batch; pending [B] is the first token of each output."""

    def extend(self, batch: Batch, pending: Tensor) -> None:
        """More rows, behind those that are there; capacity and most are those of the start."""

    def propose(self, pending: Tensor, counts: Tensor, state: DecodeState, sampler: Sampler) -> Draft:
        """At most counts[b] tokens behind pending [B]. state: the model's own; it must be as it was afterwards."""

    def committed(self, draft: Draft, accepted: Tensor, ids: Tensor) -> None:
        """accepted[b] tokens of the draft, of a tree the branch that was chosen, were kept, and ids [B] is pending."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; without any, until the next start."""

    def compile(self) -> None:
        """Compile the step of its model, where it has one."""

    def state_bytes(self) -> int:
        """Bytes of decode state of its own that it holds now."""


class LookupDrafter:
    """Continues as an earlier occurrence of the last n tokens did, in prompt or output (Saxena 2023, prompt lookup).

    The longest match counts, n_max tokens at most, and of equally long ones the most recent. n_branches: so many
    occurrences that went on differently are drafted side by side, the next best after the best.
    """

    vocab_size: int | None = None

    def __init__(self, n_max: int = 3, n_branches: int = 1) -> None:
        if n_max < 1 or n_branches < 1:
            raise UserError(f"lookup: matches of {n_max} tokens, {n_branches} branches; the least is 1 of each")
        self.name = "lookup" if n_branches == 1 else f"lookup-tree:{n_branches}"
        self.n_max, self.n_branches = n_max, n_branches
        self.rows: list[NgramIndex] = []

    def check(self, n_tokens: int) -> None:
        """Any length will do."""

    def start(self, batch: Batch, pending: Tensor) -> None:
        self.rows = []
        self.extend(batch, pending)

    def extend(self, batch: Batch, pending: Tensor) -> None:
        new = zip(batch.prompts, pending.tolist())
        self.rows += [NgramIndex([*prompt, token], self.n_max) for prompt, token in new]

    def propose(self, pending: Tensor, counts: Tensor, state: DecodeState, sampler: Sampler) -> Draft:
        trees = [index.continuations(n, self.n_branches) or [[]] for index, n in zip(self.rows, counts.tolist())]
        found = [tokens for tree in trees for tokens in tree]
        longest = max(len(tokens) for tokens in found)
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in found]
        tokens = torch.tensor(padded, dtype=torch.int64, device=counts.device).view(len(found), longest)
        lengths = torch.tensor([len(tokens) for tokens in found], device=counts.device)
        if len(found) == len(trees):
            return Draft(tokens, lengths)
        rows = [row for row, tree in enumerate(trees) for _ in tree]
        return Draft(tokens, lengths, rows=torch.tensor(rows, device=counts.device))

    def committed(self, draft: Draft, accepted: Tensor, ids: Tensor) -> None:
        for index, tokens, n, token in zip(self.rows, draft.tokens.tolist(), accepted.tolist(), ids.tolist()):
            for each in (*tokens[:n], token):
                index.append(each)

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def compile(self) -> None:
        """There is no model."""

    def state_bytes(self) -> int:
        return 0


LOOKED_AT = 32
"""Occurrences of one run of tokens that are looked at for branches, the most recent ones."""


class NgramIndex:
    """Where each run of up to n_max tokens was followed by something; a token more costs O(n_max)."""

    def __init__(self, tokens: Sequence[int], n_max: int) -> None:
        self.n_max = n_max
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], list[int]] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token."""
        end = len(self.tokens)
        for n in range(1, min(self.n_max, end) + 1):
            self.follows.setdefault(tuple(self.tokens[end - n :]), []).append(end)
        self.tokens.append(token)

    def continuations(self, most: int, n_branches: int = 1) -> list[list[int]]:
        """At most `most` tokens that came behind the longest known end of the text; up to n_branches of them, best
        first, none of which begins as another one ends."""
        found: list[list[int]] = []
        if most < 1:
            return found
        for n in range(min(self.n_max, len(self.tokens)), 0, -1):
            ends = self.follows.get(tuple(self.tokens[len(self.tokens) - n :]), [])
            for at in reversed(ends[-LOOKED_AT:] if n_branches > 1 else ends[-1:]):
                tokens = self.tokens[at : at + most]
                if not any(each[: len(tokens)] == tokens[: len(each)] for each in found):
                    found.append(tokens)
                if len(found) == n_branches:
                    return found
        return found


class SelfDrafter:
    """Part of the model itself, on the model's own state: `within` is entered while it drafts (a slice of a nested
    model, a loop with fewer loops). What it writes is rolled back before the model reads the draft."""

    def __init__(self, model: DecoderLike, within: Callable[[], AbstractContextManager[None]], name: str) -> None:
        self.model, self.within, self.name = model, within, name
        self.step: Step = PlainStep(model)
        self.vocab_size: int | None = None
        self.streams: _DraftStreams | None = None

    def check(self, n_tokens: int) -> None:
        """Any length that the model reads will do."""

    def start(self, batch: Batch, pending: Tensor) -> None:
        self.streams = _DraftStreams(batch.samplings)

    def extend(self, batch: Batch, pending: Tensor) -> None:
        assert self.streams is not None
        self.streams.extend(_DraftStreams(batch.samplings))

    def propose(self, pending: Tensor, counts: Tensor, state: DecodeState, sampler: Sampler) -> Draft:
        assert self.streams is not None
        most = int(counts.max())
        state.begin(most)
        with self.within():
            draft = _draw_chain(self.step, state, pending, counts, self.streams.sampler(sampler))
        state.abort()
        return draft

    def committed(self, draft: Draft, accepted: Tensor, ids: Tensor) -> None:
        """The state is the model's."""

    def keep(self, rows: Sequence[int]) -> None:
        assert self.streams is not None
        self.streams.keep(rows)

    def compile(self) -> None:
        self.step = CompiledStep(self.model)

    def state_bytes(self) -> int:
        return 0


class ModelDrafter:
    """A smaller model of the same vocabulary, with a state of its own."""

    def __init__(self, model: DecoderLike, name: str = "model", prefill_chunk: int | None = 1024) -> None:
        self.model, self.name, self.prefill_chunk = model, name, prefill_chunk
        self.step: Step = PlainStep(model)
        self.vocab_size: int | None = model.config.required_vocab_size()
        weight = next(model.parameters())  # type: ignore[attr-defined]
        self.device, self.dtype = weight.device, weight.dtype
        self.streams: _DraftStreams | None = None
        self.state: DecodeState | None = None
        self.unread = self.n_unread = torch.zeros(0, dtype=torch.int64)

    def check(self, n_tokens: int) -> None:
        most = self.model.config.max_context
        if most is not None and n_tokens > most:
            raise UserError(
                f"{self.name} can read {most} tokens, too few to draft for a prompt and output of {n_tokens}; "
                "lower max_new_tokens or the context, or use another drafter"
            )

    def start(self, batch: Batch, pending: Tensor) -> None:
        self.streams, self.state = _DraftStreams(batch.samplings), self._read(batch)
        self.unread, self.n_unread = pending[:, None], torch.ones_like(pending)

    def extend(self, batch: Batch, pending: Tensor) -> None:
        assert self.state is not None and self.streams is not None
        self.streams.extend(_DraftStreams(batch.samplings))
        self.state.extend(self._read(batch))
        fresh = pending.new_zeros(len(pending), max(1, self.unread.shape[1]))
        fresh[:, 0] = pending
        old = F.pad(self.unread, (0, fresh.shape[1] - self.unread.shape[1]))
        self.unread = torch.cat([old, fresh])
        self.n_unread = torch.cat([self.n_unread, torch.ones_like(pending)])

    def _read(self, batch: Batch) -> DecodeState:
        """A state that has read the prompts."""
        capacity = min(batch.capacity, self.model.config.max_context or batch.capacity)
        state = self.model.new_state(
            len(batch.prompts), capacity, n_tentative=batch.most, dtype=self.dtype, device=self.device
        )
        prefill(self.model, batch.prompts, state, self.prefill_chunk)
        return state

    def propose(self, pending: Tensor, counts: Tensor, state: DecodeState, sampler: Sampler) -> Draft:
        assert self.state is not None and self.streams is not None
        logits = _read(self.step, self.state, self.unread, self.n_unread)
        self.n_unread = torch.zeros_like(self.n_unread)
        self.unread = self.unread[:, :0]
        self.state.begin(int(counts.max()))
        return _draw_chain(self.step, self.state, pending, counts, self.streams.sampler(sampler), logits)

    def committed(self, draft: Draft, accepted: Tensor, ids: Tensor) -> None:
        assert self.state is not None
        n_read = (draft.counts - 1).clamp(min=0)
        if self.state.n_tentative is not None:
            self.state.commit(torch.minimum(accepted, n_read))
        # The last token of a draft has not been read; if it was kept it comes before the one that is pending now.
        missing = accepted > n_read
        last = draft.tokens.gather(1, (accepted - 1).clamp(min=0)[:, None]) if draft.tokens.shape[1] else ids[:, None]
        n_old = self.unread.shape[1]
        place = torch.arange(n_old + 2, device=ids.device)
        behind = torch.where((place == self.n_unread[:, None]) & missing[:, None], n_old, n_old + 1)
        index = torch.where(place < self.n_unread[:, None], place, behind)
        self.unread = torch.cat([self.unread, last, ids[:, None]], dim=1).gather(1, index)
        self.n_unread = self.n_unread + 1 + missing

    def keep(self, rows: Sequence[int]) -> None:
        assert self.state is not None and self.streams is not None
        if not rows:
            self.state = self.streams = None
            return
        index = torch.tensor(list(rows), device=self.device)
        self.state.reorder(index)
        self.streams.keep(rows)
        self.unread, self.n_unread = self.unread[index], self.n_unread[index]

    def compile(self) -> None:
        # After a draft that was kept whole, its last token is read together with the one behind it.
        self.step = CompiledStep(self.model, [1])

    def state_bytes(self) -> int:
        return 0 if self.state is None else self.state.held_bytes()


class _DraftStreams:
    """Random streams of drafts, apart from those of the model's own draws."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        self.sampler_of_drafts = Sampler(
            [s.replace(seed=None if s.seed is None else s.seed + DRAFT_SEED) for s in samplings], None, 0, "cpu"
        )

    def sampler(self, own: Sampler) -> Sampler:
        """A sampler that has seen what the model's own has."""
        self.sampler_of_drafts.seen = None if own.seen is None else own.seen.clone()
        return self.sampler_of_drafts

    def keep(self, rows: Sequence[int]) -> None:
        self.sampler_of_drafts.seen = None
        self.sampler_of_drafts.keep(rows)

    def extend(self, other: _DraftStreams) -> None:
        self.sampler_of_drafts.seen = None
        self.sampler_of_drafts.extend(other.sampler_of_drafts)


DRAFT_SEED = 0x5EED0000
"""Between the seed of an output and that of its drafts."""


def _read(step: Step, state: DecodeState, tokens: Tensor, counts: Tensor) -> Tensor:
    """Logits [B, V] behind the last of counts[b] >= 1 more tokens [B, N]."""
    n = int(counts.max())
    valid = torch.arange(n, device=tokens.device) < counts[:, None] if int(counts.min()) < n else None
    logits = step(tokens[:, :n], valid, state)
    return logits[torch.arange(len(tokens), device=tokens.device), counts - 1]


def _draw_chain(
    read: Step,
    state: DecodeState,
    pending: Tensor,
    counts: Tensor,
    sampler: Sampler,
    logits: Tensor | None = None,
) -> Draft:
    """counts[b] tokens, one after another, within the open transaction. logits [B, V]: behind the pending token, where
    the state has read it already. The last token of each row is not read."""
    tokens, probs = [], []
    token = pending
    for step in range(int(counts.max())):
        active = counts > step
        if logits is None or step > 0:
            logits = read(token[:, None], None if bool(active.all()) else active[:, None], state)[:, -1]
        token, q = sampler.draft(logits, active)
        tokens.append(token)
        probs.append(q)
    if not tokens:
        return Draft(pending.new_zeros(len(pending), 0), counts)
    sampled = any(not s.greedy for s in sampler.samplings)
    return Draft(torch.stack(tokens, dim=1), counts, torch.stack(probs, dim=1) if sampled else None)
