"""Scheduler: requests that come and go while others run, in one batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.core.errors import UserError
from llm.core.state import DecodeState, PagedKVState, Pages
from llm.core.states.paged import leaves
from llm.generate.acceptance import accept_chosen, behind, best_branches
from llm.generate.drafters import Batch, Draft, Drafter
from llm.generate.events import FinishReason, Speculation, TokenEvent
from llm.generate.prefill import Prefill, Prompt, PromptStream
from llm.generate.prefix_cache import Chain, PrefixCache
from llm.generate.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from llm.generate.engine import Engine


class Scheduler:
    """Runs requests on an engine, `engine.max_batch` of them together; not to be used from several threads at once.

    Waiting requests are read together, a chunk of their prompts in each step, beside those that run: when all of them
    have a place, or a quarter of the places is free. An engine with a drafter serves one scheduler at a time.

    n_prompt_read, n_prompt_reused: tokens of prompts that the model has read, or did not need to. Where the engine
    shares prefixes, requests whose prompts begin alike are not read together: all but one wait until that one has been.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.n_prompt_read = self.n_prompt_reused = 0
        self.pages = Pages(engine.page_size) if engine.paged else None
        self.prefix_cache: PrefixCache | None = None
        if self.pages is not None and engine.prefix_cache:
            self.prefix_cache = PrefixCache(
                self.pages, engine.saved_every, engine.prefix_cache, saves=engine.saves_states
            )
        self._n_submitted = 0
        self._waiting: deque[_Request] = deque()
        self._joining: _Group | None = None
        self._running: _Group | None = None
        self._in_step = False

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        stop: Callable[[int], bool] | None = None,
        n_logprobs: int | None = None,
    ) -> int:
        """Let a request wait for its turn; its number, which no other request of this scheduler has.

        stop: token -> whether the output ends with it; called once for each token, in order. n_logprobs: how many of
        the likeliest tokens are told with each token, next to its own log-probability; None: neither. UserError when
        the prompt is empty, holds an id outside the vocabulary, leaves no room for a new token, or is too long to be
        drafted for.
        """
        engine = self.engine
        engine.check(prompt, "the prompt")
        if isinstance(prompt, PromptStream) and sampling.repetition_penalty != 1:
            raise UserError("a prompt that is streamed goes with no repetition_penalty, for which it must be held")
        if isinstance(prompt, PromptStream) and engine.prefix_cache:
            raise UserError("a prompt that is streamed goes with no prefix_cache, for which it must be held")
        request = _Request(self._n_submitted, prompt, sampling, engine.context, stop, n_logprobs)
        if engine.drafter is not None:
            engine.drafter.check(len(prompt) + request.limit)
        self._n_submitted += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, request: int) -> None:
        """End a request without another token; its row and place are free before the next forward. No effect when it
        has ended."""
        for each in self._all():
            if each.number == request:
                each.ended = True
        if not self._in_step:
            self._drop()

    @property
    def n_running(self) -> int:
        """Requests that have a place, those whose prompts are being read included."""
        groups = [group for group in (self._joining, self._running) if group is not None]
        return sum(not request.ended for group in groups for request in group.requests)

    @property
    def n_waiting(self) -> int:
        """Requests that have no place yet."""
        return sum(not request.ended for request in self._waiting)

    def state_bytes(self) -> int:
        """Bytes of decode state held now, the drafter's and what is kept for later prompts included."""
        groups = [group for group in (self._joining, self._running) if group is not None]
        drafter = self.engine.drafter
        own = drafter.state_bytes() if drafter is not None and self._running is not None else 0
        parts = [part for group in groups for part in leaves(group.state) if not isinstance(part, PagedKVState)]
        in_pages = 0 if self.pages is None else self.pages.held_bytes()
        saved = 0 if self.prefix_cache is None else self.prefix_cache.saved_bytes()
        return own + in_pages + saved + sum(part.held_bytes() for part in parts)

    def prefix_cache_bytes(self) -> int:
        """Bytes of pages and saved states kept for later prompts."""
        return 0 if self.prefix_cache is None else self.prefix_cache.held_bytes()

    @property
    def speculation(self) -> Speculation:
        """What came of the engine's drafts."""
        return self.engine.speculation

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        """Admit waiting requests, read some of their prompts, one forward of those that run (with a drafter: one draft
        and its check). The tokens that came of it, in order for each request; [] when there is nothing to do."""
        self._in_step = True
        try:
            self._admit()
            events: list[TokenEvent] = []
            while self._joining is not None and not events:
                joining, prefill = self._joining, self._joining.prefill
                assert prefill is not None
                prefill.read()
                if self.prefix_cache is not None and self.prefix_cache.saves:
                    self._remember(joining, range(len(joining.requests)))
                if prefill.done:
                    self._joining = None
                    events += self._join(joining)
                if self._running is not None:
                    break
            if self._running is not None:
                events += self._forward(self._running)
        finally:
            self._in_step = False
            self._drop()
        return events

    def _all(self) -> list[_Request]:
        groups = [group for group in (self._joining, self._running) if group is not None]
        return [*self._waiting, *(request for group in groups for request in group.requests)]

    def _drop(self) -> None:
        """Free what requests hold that have ended or were cancelled."""
        self._waiting = deque(request for request in self._waiting if not request.ended)
        if self._joining is not None and (rows := self._joining.left()) is not None:
            self._joining = self._keep(self._joining, rows)
        if self._running is not None and (rows := self._running.left()) is not None:
            if self.engine.drafter is not None:
                self.engine.drafter.keep(rows)
                self.engine.draft_length.keep(rows)
            self._running = self._keep(self._running, rows)

    def _keep(self, group: _Group, rows: list[int]) -> _Group | None:
        """The group with these rows only; None when there are none. What the others have read is remembered."""
        self._remember(group, set(range(len(group.requests))) - set(rows))
        if rows:
            group.keep(rows)
            return group
        group.state.release()
        return None

    def _remember(self, group: _Group, rows: Iterable[int]) -> None:
        if self.prefix_cache is not None:
            rows = list(rows)
            self.prefix_cache.keep(group.state, rows, [group.requests[row].tokens for row in rows])

    def _admit(self) -> None:
        """Begin to read the prompts of waiting requests, if it is time to."""
        most = self.engine.max_batch
        free = most - (0 if self._running is None else len(self._running.requests))
        n_waiting = len(self._waiting)
        if self._joining is None and n_waiting and free >= min(n_waiting, max(1, most // 4)):
            self._joining = self._begin(free)

    def _begin(self, n: int) -> _Group:
        """At most n of the requests that wait, those first that came first."""
        engine, cache = self.engine, self.prefix_cache
        if cache is None:
            requests = [self._waiting.popleft() for _ in range(min(len(self._waiting), n))]
            state = engine.new_state(len(requests), self.pages)
            starts = [0] * len(requests)
            if engine.prefix is not None:
                engine.prefix.restore(state)
                starts = [engine.prefix.n_read] * len(requests)
        else:
            requests, chains = self._choose(cache, n)
            state = engine.new_state(len(requests), self.pages)
            starts = cache.begin(state, chains)
        self.n_prompt_reused += sum(starts)
        self.n_prompt_read += sum(len(request.prompt) for request in requests) - sum(starts)
        return _Group(engine, requests, state, starts)

    def _choose(self, cache: PrefixCache, n: int) -> tuple[list[_Request], list[Chain]]:
        """Requests of which no two would read the same page next, and what is known of each."""
        requests: list[_Request] = []
        chains: list[Chain] = []
        later: deque[_Request] = deque()
        being_read = set()
        for request in self._waiting:
            chain = cache.find(_held(request)) if len(requests) < n else []
            missing = cache.missing(_held(request), chain)
            if len(requests) == n or missing in being_read:
                later.append(request)
                continue
            requests.append(request)
            chains.append(chain)
            if missing is not None:
                being_read.add(missing)
        self._waiting = later
        return requests, chains

    def _join(self, fresh: _Group) -> list[TokenEvent]:
        """Requests whose prompts have been read say their first tokens and run with the others."""
        engine = self.engine
        logits = fresh.first_token()
        self._remember(fresh, range(len(fresh.requests)))
        events = fresh.say(fresh.pending[:, None], [0] * len(fresh.requests), logits[:, None], engine.eos_id)
        rows = fresh.left()
        if rows is not None:
            if not rows:
                fresh.state.release()
                return events
            fresh.keep(rows)
        if engine.drafter is not None:
            prompts, samplings = list(map(_held, fresh.requests)), [r.sampling for r in fresh.requests]
            batch = Batch(prompts, samplings, engine.context, engine.draft_length.most)
            add = engine.drafter.start if self._running is None else engine.drafter.extend
            add(batch, fresh.pending)
            if self._running is None:
                engine.draft_length.start(0)
            engine.draft_length.extend(len(fresh.requests))
        if self._running is None:
            self._running = fresh
        else:
            self._running.extend(fresh)
        return events

    def _forward(self, group: _Group) -> list[TokenEvent]:
        """One forward of a row's pending token, and of a draft behind it where there is a drafter."""
        engine = self.engine
        if engine.drafter is not None:
            return self._speculate(engine.drafter, group)
        logits = engine.step(group.pending[:, None], None, group.state)
        group.pending = group.sampler(logits[:, -1])
        return group.say(group.pending[:, None], [0] * len(group.requests), logits, engine.eos_id)

    def _speculate(self, drafter: Drafter, group: _Group) -> list[TokenEvent]:
        engine, state, pending = self.engine, group.state, group.pending
        started = time.perf_counter()
        most = engine.draft_length.next()
        wanted = [min(request.limit - request.n_made - 1, most) for request in group.requests]
        counts = torch.tensor(wanted, device=engine.device)
        draft = Draft(pending.new_zeros(len(pending), 0), torch.zeros_like(counts))
        if max(wanted) > 0:
            draft = drafter.propose(pending, counts, state, group.sampler)
        drafted = time.perf_counter()
        n_drafted = draft.counts.tolist()
        if draft.rows is not None:
            # Branches of a tree are rows of their own, to which any state can be copied.
            state.reorder(draft.rows)
            pending = pending[draft.rows]
            owners = draft.rows.tolist()
            n_drafted = [sum(n for n, row in zip(n_drafted, owners) if row == own) for own in range(len(wanted))]
        n = draft.tokens.shape[1]
        tokens = torch.cat([pending[:, None], draft.tokens], dim=1)
        width = engine.step.width(n + 1)
        if n and int(state.end().max()) + width <= engine.context:
            tokens = F.pad(tokens, (0, width - n - 1))
        steps = torch.arange(tokens.shape[1], device=engine.device)
        valid = None if int(draft.counts.min()) == len(steps) - 1 else steps <= draft.counts[:, None]
        state.begin(len(steps))
        logits = engine.step(tokens, valid, state)[:, : n + 1]
        draft, accepted, ids, logits = self._take(group, draft, logits)
        drafter.committed(draft, accepted, ids)
        given, kept = draft.counts.tolist(), accepted.tolist()
        group.pending = ids
        engine.speculation.add(n_drafted, kept)
        engine.draft_length.observe(given, kept, drafted - started, time.perf_counter() - drafted)
        return group.say(behind(draft.tokens, accepted, ids), kept, logits, engine.eos_id)

    @staticmethod
    def _take(group: _Group, draft: Draft, logits: Tensor) -> tuple[Draft, Tensor, Tensor, Tensor]:
        """(the draft, of a tree the best branches, accepted [B], next ids [B], logits [B, N + 1, V]) by the logits
        [R, N + 1, V] of the draft's rows; the state holds what was accepted."""
        if draft.q is not None:
            accepted, ids = group.sampler.accept(logits, draft.tokens, draft.counts, draft.q)
            group.state.commit(accepted + 1)
            return draft, accepted, ids, logits
        n_rows = len(group.requests)
        owners = range(n_rows) if draft.rows is None else draft.rows.tolist()
        targets = group.sampler.choose(logits, draft.tokens, owners)
        accepted, ids = accept_chosen(targets, draft.tokens, draft.counts)
        group.state.commit(accepted + 1)
        if draft.rows is not None:
            best = best_branches(accepted, draft.rows, n_rows)
            group.state.reorder(best)
            draft = Draft(draft.tokens[best], draft.counts[best])
            accepted, ids, logits = accepted[best], ids[best], logits[best]
        group.sampler.use(behind(draft.tokens, accepted, ids), accepted + 1)
        return draft, accepted, ids, logits


class _Request:
    """limit: most new tokens; n_made: those so far. tokens: of the prompt, and the new ones."""

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        sampling: Sampling,
        context: int,
        stop: Callable[[int], bool] | None,
        n_logprobs: int | None,
    ) -> None:
        self.number, self.prompt, self.sampling = number, prompt, sampling
        self.tokens = list(_held(self))
        self.stop, self.n_logprobs = stop, n_logprobs
        self.limit = min(sampling.max_new_tokens, context - len(prompt))
        self.n_made = 0
        self.ended = False

    def finish(self, token: int, eos_id: int | None) -> FinishReason | None:
        """Why the output ends with one more token, if it does."""
        self.n_made += 1
        self.tokens.append(token)
        if token == eos_id and not self.sampling.ignore_eos:
            return "eos"
        if self.stop is not None and self.stop(token):
            return "stop"
        if self.n_made >= self.limit:
            return "length" if self.limit == self.sampling.max_new_tokens else "context"
        return None


class _Group:
    """Requests that are read, or run, together: row b of each part is requests[b]. pending [B]: the newest token of
    each output, which the state has not read yet. starts[b]: tokens of the prompt that the state has read already."""

    def __init__(self, engine: Engine, requests: list[_Request], state: DecodeState, starts: Sequence[int]) -> None:
        self.requests, self.state = requests, state
        self.model = engine.model
        prompts = [request.prompt for request in requests]
        vocab_size = engine.model.config.required_vocab_size()
        self.sampler = Sampler(
            [request.sampling for request in requests], list(map(_held, requests)), vocab_size, engine.device
        )
        self.prefill: Prefill | None = Prefill(engine.model, prompts, self.state, engine.prefill_chunk, starts)
        self.pending = torch.zeros(len(requests), dtype=torch.int64, device=engine.device)

    def first_token(self) -> Tensor:
        """Logits [B, V] behind the prompts, from which `pending` is drawn."""
        assert self.prefill is not None and self.prefill.last is not None
        logits = self.model.head(self.prefill.last)
        self.prefill = None
        self.pending = self.sampler(logits)
        return logits

    def left(self) -> list[int] | None:
        """Rows of requests that go on; None: all of them."""
        rows = [row for row, request in enumerate(self.requests) if not request.ended]
        return None if len(rows) == len(self.requests) else rows

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, of which there is at least one."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.pending.device)
        self.requests = [self.requests[row] for row in rows]
        self.sampler.keep(rows)
        self.pending = self.pending[index]
        if self.prefill is not None:
            self.prefill.keep(rows)
        else:
            self.state.reorder(index)

    def extend(self, other: _Group) -> None:
        """Go on with the requests of another group too."""
        self.requests += other.requests
        self.state.extend(other.state)
        self.sampler.extend(other.sampler)
        self.pending = torch.cat([self.pending, other.pending])

    def say(self, tokens: Tensor, n_before: Sequence[int], logits: Tensor, eos_id: int | None) -> list[TokenEvent]:
        """Events of the first n_before[b] + 1 of tokens [B, N], or of fewer when one of them ends the output. logits
        [B, N, V]: what the model said at each place."""
        events = []
        for row, (request, new) in enumerate(zip(self.requests, tokens.tolist(), strict=True)):
            if request.ended:
                continue
            new = new[: n_before[row] + 1]
            told = None
            if request.n_logprobs is not None:
                told = _log_probabilities(logits[row, : len(new)], tokens[row, : len(new)], request.n_logprobs)
            for place, token in enumerate(new):
                finish = request.finish(token, eos_id)
                own, top = (None, ()) if told is None else told[place]
                events.append(TokenEvent(request.number, token, finish, own, top))
                if finish is not None:
                    request.ended = True
                if request.ended:
                    break
        return events


def _held(request: _Request) -> Sequence[int]:
    """The prompt's tokens; none of a stream, for which nothing is asked that needs them."""
    return () if isinstance(request.prompt, PromptStream) else request.prompt


def _log_probabilities(logits: Tensor, tokens: Tensor, n: int) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Of each of tokens [N], by logits [N, V], and the n likeliest (token, log-probability) in its place."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(n, logprobs.shape[-1]), dim=-1)
    return [(o, tuple(zip(i, v))) for o, i, v in zip(own, ids.tolist(), values.tolist())]
