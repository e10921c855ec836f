"""Engine: batched generation of token ids. The model's past lives in its DecodeState and nowhere else."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import Batch, Draft, Drafter
from llm.generate.prefill import prefill
from llm.generate.prefix import Prefix, fingerprint
from llm.generate.sampling import Sampler, Sampling
from llm.models.decoder import DecoderLike

FinishReason = Literal["eos", "stop", "length", "context"]
"""eos: the model ended the text. stop: a stop text. length: max_new_tokens. context: the model's max_seq_len."""


@dataclass(frozen=True)
class TokenEvent:
    """A token of a request, as soon as it is known. finish: None while the request goes on."""

    request: int
    token: int
    finish: FinishReason | None = None


@dataclass
class Completion:
    """The new tokens of a request, without the end-of-text token, and why they ended."""

    tokens: list[int] = field(default_factory=list)
    finish: FinishReason = "length"


@dataclass
class Speculation:
    """What came of speculative decoding so far. n_rounds: drafts checked, one for each row of a forward; n_drafted,
    n_accepted: their tokens; by_accepted: number of rounds by how many tokens were kept."""

    n_rounds: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    by_accepted: Counter[int] = field(default_factory=Counter)

    def add(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """One more forward, with the tokens of each row."""
        self.n_rounds += len(drafted)
        self.n_drafted += sum(drafted)
        self.n_accepted += sum(accepted)
        self.by_accepted.update(accepted)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were kept."""
        return self.n_accepted / self.n_drafted if self.n_drafted else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a forward gave, per row: those kept and one more."""
        return 1 + self.n_accepted / self.n_rounds if self.n_rounds else 1.0


StopCheck = Callable[[int, int], bool]
"""(request, token) -> whether the output ends with this token; called once for each token, in order."""


class Engine:
    """Continues prompts with a model.

    eos_id: token that ends a text (None: there is none). max_batch: requests that run together; when a quarter of them
    has ended, waiting ones take their places (with a drafter: when all have). prefill_chunk: tokens
    of the prompts that are read at once (None: all). context: most tokens of prompt and output (None: the model's own
    max_seq_len; more than that only where its position encoding allows it). drafter: speculative decoding, whose
    outputs have the same law, and are the same when greedy; draft_length: tokens that it drafts at once. prefix: a text
    that was read before, with which every prompt begins.
    """

    def __init__(
        self,
        model: DecoderLike,
        *,
        eos_id: int | None = None,
        max_batch: int = 32,
        prefill_chunk: int | None = 1024,
        context: int | None = None,
        drafter: Drafter | None = None,
        draft_length: DraftLength | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self.model = model
        self.drafter, self.draft_length = drafter, draft_length or DraftLength()
        self.speculation = Speculation()
        self.prefix = prefix
        if drafter is not None and drafter.vocab_size not in (None, model.config.required_vocab_size()):
            raise UserError(
                f"{drafter.name} drafts with a vocabulary of {drafter.vocab_size}, the model has "
                f"{model.config.required_vocab_size()}"
            )
        self.eos_id = eos_id
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.context = context or model.config.max_seq_len
        if self.context > (model.config.max_context or self.context):
            raise UserError(
                f"context={context} is longer than the model's position table of {model.config.max_seq_len} tokens; "
                "lower it"
            )
        if prefix is not None:
            if prefix.model != fingerprint(model):
                raise UserError("the saved state comes from another model, or from other weights of it; save it anew")
            if prefix.capacity != self.context:
                raise UserError(
                    f"the saved state was made for a context of {prefix.capacity} tokens, not {self.context}; set "
                    f"context={prefix.capacity} or save it anew"
                )
        weight = next(model.parameters())  # type: ignore[attr-defined]
        self.device, self.dtype = weight.device, weight.dtype

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        stop: StopCheck | None = None,
    ) -> list[Completion]:
        """The completions of all prompts, in their order. Errors as `stream`."""
        completions = [Completion() for _ in prompts]
        for event in self.stream(prompts, sampling, stop=stop):
            if event.finish != "eos":
                completions[event.request].tokens.append(event.token)
            if event.finish is not None:
                completions[event.request].finish = event.finish
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        stop: StopCheck | None = None,
    ) -> Iterator[TokenEvent]:
        """Tokens of all requests as they come. sampling: one for all, or one for each prompt.

        UserError when a prompt is empty, holds an id outside the vocabulary or leaves no room for a new token.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        assert len(samplings) == len(prompts), "one Sampling for each prompt"
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = [_Row(i, prompts[i], samplings[i], self.context) for i in order]
        if self.drafter is None:
            yield from self._run(rows, stop)
            return
        for start in range(0, len(rows), self.max_batch):
            yield from self._run(rows[start : start + self.max_batch], stop)

    def _check(self, number: int, prompt: Sequence[int]) -> None:
        vocab = self.model.config.required_vocab_size()
        if not prompt:
            raise UserError(f"prompt {number} has no tokens; give at least one")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(
                f"prompt {number} holds token id {max(prompt) if min(prompt) >= 0 else min(prompt)}; "
                f"the model's ids are 0 to {vocab - 1}: is this the tokenizer that the model was trained with?"
            )
        if len(prompt) >= self.context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and the model's context is {self.context}, which leaves no "
                f"room for new ones; shorten it to at most {self.context - 1} tokens"
            )
        if self.prefix is not None:
            self.prefix.check(number, prompt)

    @torch.no_grad()
    def _run(self, rows: Sequence[_Row], stop: StopCheck | None) -> Iterator[TokenEvent]:
        """Tokens of all rows, of which max_batch run together; others take the places of those that end."""
        capacity = max(row.capacity for row in rows) if self.prefix is None else self.prefix.capacity
        waiting, going = deque(rows), list[_Row]()
        state, sampler, pending = self._admit(waiting, capacity, going)
        if self.drafter is not None:
            most = self.draft_length.most
            self.drafter.start(Batch([r.prompt for r in going], [r.sampling for r in going], capacity, most), pending)
            self.draft_length.start(len(going))
        new = [[token] for token in pending.tolist()]
        while True:
            kept: list[int] = []
            for place, (row, tokens) in enumerate(zip(going, new, strict=True)):
                finish: FinishReason | None = None
                for token in tokens:
                    row.made += 1
                    finish = self._finish(row, token, stop)
                    yield TokenEvent(row.request, token, finish)
                    if finish is not None:
                        break
                if finish is None:
                    kept.append(place)
            if not kept and not waiting:
                return
            if len(kept) < len(going):
                going = [going[place] for place in kept]
                index = torch.tensor(kept, dtype=torch.int64, device=self.device)
                state.reorder(index)
                sampler.keep(kept)
                pending = pending[index]
                if self.drafter is not None:
                    self.drafter.keep(kept)
                    self.draft_length.keep(kept)
            if waiting and self.max_batch - len(going) >= max(1, self.max_batch // 4):
                n_old = len(going)
                fresh, drawn, first = self._admit(waiting, capacity, going)
                if n_old:
                    _append(state, fresh)
                    sampler.extend(drawn)
                    pending = torch.cat([pending, first])
                else:
                    state, sampler, pending = fresh, drawn, first
                # Those who were there have said their newest token already; the new ones have not.
                new = [[] for _ in range(n_old)] + [[token] for token in first.tolist()]
                continue
            if self.drafter is None:
                seq = SeqInfo(positions=state.end()[:, None])
                pending = sampler(self.model.head(self.model(pending[:, None], seq, state=state).hidden[:, -1]))
                new = [[token] for token in pending.tolist()]
            else:
                room = [row.limit - row.made - 1 for row in going]
                pending, new = self._speculate(self.drafter, pending, room, state, sampler)

    def _admit(self, waiting: deque[_Row], capacity: int, going: list[_Row]) -> tuple[DecodeState, Sampler, Tensor]:
        """(state, sampler, first token [B]) of as many waiting rows as there is room for, which join those going."""
        rows = [waiting.popleft() for _ in range(min(len(waiting), self.max_batch - len(going)))]
        going.extend(rows)
        prompts = [row.prompt for row in rows]
        most = self.draft_length.most if self.drafter is not None else 0
        state = self.model.new_state(
            len(rows), capacity, n_tentative=most + 1 if most else 0, dtype=self.dtype, device=self.device
        )
        n_read = 0
        if self.prefix is not None:
            self.prefix.restore(state)
            n_read = self.prefix.n_read
        vocab_size = self.model.config.required_vocab_size()
        sampler = Sampler([row.sampling for row in rows], prompts, vocab_size, self.device)
        hidden = prefill(self.model, prompts, state, self.prefill_chunk, n_read)
        return state, sampler, sampler(self.model.head(hidden))

    def _speculate(
        self, drafter: Drafter, pending: Tensor, room: list[int], state: DecodeState, sampler: Sampler
    ) -> tuple[Tensor, list[list[int]]]:
        """(pending [B], the new tokens of each row) after a draft of at most room[b] tokens and one forward."""
        started = time.perf_counter()
        most = self.draft_length.next()
        wanted = [min(n, most) for n in room]
        counts = torch.tensor(wanted, device=self.device)
        draft = Draft(pending.new_zeros(len(pending), 0), torch.zeros_like(counts))
        if max(wanted) > 0:
            draft = drafter.propose(pending, counts, state, sampler)
        drafted = time.perf_counter()
        n = draft.tokens.shape[1]
        steps = torch.arange(n + 1, device=self.device)
        valid = None if int(draft.counts.min()) == n else steps <= draft.counts[:, None]
        state.begin(n + 1)
        seq = SeqInfo(positions=state.end()[:, None] + steps, valid=valid)
        hidden = self.model(torch.cat([pending[:, None], draft.tokens], dim=1), seq, state=state).hidden
        accepted, ids = sampler.accept(self.model.head(hidden), draft.tokens, draft.counts, draft.q)
        state.commit(accepted + 1)
        drafter.committed(draft, accepted, ids)
        given, kept = draft.counts.tolist(), accepted.tolist()
        rows = zip(draft.tokens.tolist(), kept, ids.tolist(), strict=True)
        new = [[*tokens[:a], token] for tokens, a, token in rows]
        self.speculation.add(given, kept)
        self.draft_length.observe(given, kept, drafted - started, time.perf_counter() - drafted)
        return ids, new

    def _finish(self, row: _Row, token: int, stop: StopCheck | None) -> FinishReason | None:
        if token == self.eos_id and not row.sampling.ignore_eos:
            return "eos"
        if stop is not None and stop(row.request, token):
            return "stop"
        if row.made >= row.limit:
            return "length" if row.limit == row.sampling.max_new_tokens else "context"
        return None


class _Row:
    """A request that runs or waits. limit: most new tokens; made: those so far."""

    def __init__(self, request: int, prompt: Sequence[int], sampling: Sampling, context: int) -> None:
        self.request, self.prompt, self.sampling = request, prompt, sampling
        self.limit = min(sampling.max_new_tokens, context - len(prompt))
        self.made = 0

    @property
    def capacity(self) -> int:
        """Most tokens that its state holds."""
        return len(self.prompt) + self.limit


def _append(state: DecodeState, more: DecodeState) -> None:
    """Put the rows of another state, made with the same arguments, behind those of a state."""
    n_old, n_more = state.batch, more.batch
    place = torch.arange(n_old + n_more, device=state.length.device)
    is_new = place >= n_old
    more.reorder(torch.where(is_new, place - n_old, 0))
    state.reorder(torch.where(is_new, 0, place))
    state.adopt(is_new, more)
