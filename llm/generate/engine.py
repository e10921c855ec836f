"""Engine: batched generation of token ids. The model's past lives in its DecodeState and nowhere else."""

from __future__ import annotations

import time
from collections import Counter
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

    eos_id: token that ends a text (None: there is none). max_batch: requests that run together. prefill_chunk: tokens
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
        for start in range(0, len(order), self.max_batch):
            requests = order[start : start + self.max_batch]
            yield from self._batch(requests, [prompts[i] for i in requests], [samplings[i] for i in requests], stop)

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
    def _batch(
        self, requests: list[int], prompts: list[Sequence[int]], samplings: list[Sampling], stop: StopCheck | None
    ) -> Iterator[TokenEvent]:
        lengths = [len(prompt) for prompt in prompts]
        limits = [min(s.max_new_tokens, self.context - n) for s, n in zip(samplings, lengths, strict=True)]
        capacity = max(n + limit for n, limit in zip(lengths, limits, strict=True))
        if self.prefix is not None:
            capacity = self.prefix.capacity
        most = self.draft_length.most if self.drafter is not None else 0
        state = self.model.new_state(
            len(prompts), capacity, n_tentative=most + 1 if most else 0, dtype=self.dtype, device=self.device
        )
        sampler = Sampler(samplings, prompts, self.model.config.required_vocab_size(), self.device)
        n_read = 0
        if self.prefix is not None:
            self.prefix.restore(state)
            n_read = self.prefix.n_read
        pending = sampler(self.model.head(prefill(self.model, prompts, state, self.prefill_chunk, n_read)))
        if self.drafter is not None:
            self.drafter.start(Batch(prompts, samplings, capacity, most), pending)
            self.draft_length.start(len(prompts))
        made = [0] * len(requests)
        new = [[token] for token in pending.tolist()]
        while True:
            going: list[int] = []
            for row, tokens in enumerate(new):
                finish: FinishReason | None = None
                for token in tokens:
                    made[row] += 1
                    finish = self._finish(requests[row], token, made[row], limits[row], samplings[row], stop)
                    yield TokenEvent(requests[row], token, finish)
                    if finish is not None:
                        break
                if finish is None:
                    going.append(row)
            if not going:
                return
            if len(going) < len(requests):
                index = torch.tensor(going, device=self.device)
                state.reorder(index)
                sampler.keep(going)
                pending = pending[index]
                requests = [requests[row] for row in going]
                limits = [limits[row] for row in going]
                samplings = [samplings[row] for row in going]
                made = [made[row] for row in going]
                if self.drafter is not None:
                    self.drafter.keep(going)
                    self.draft_length.keep(going)
            if self.drafter is None:
                seq = SeqInfo(positions=state.end()[:, None])
                pending = sampler(self.model.head(self.model(pending[:, None], seq, state=state).hidden[:, -1]))
                new = [[token] for token in pending.tolist()]
            else:
                room = [limit - n - 1 for limit, n in zip(limits, made, strict=True)]
                pending, new = self._speculate(self.drafter, pending, room, state, sampler)

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

    def _finish(
        self, request: int, token: int, made: int, limit: int, sampling: Sampling, stop: StopCheck | None
    ) -> FinishReason | None:
        if token == self.eos_id and not sampling.ignore_eos:
            return "eos"
        if stop is not None and stop(request, token):
            return "stop"
        if made >= limit:
            return "length" if limit == sampling.max_new_tokens else "context"
        return None
