"""Engine: batched generation of token ids. The model's past lives in its DecodeState and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
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


StopCheck = Callable[[int, int], bool]
"""(request, token) -> whether the output ends with this token; called once for each token, in order."""


class Engine:
    """Continues prompts with a model.

    eos_id: token that ends a text (None: there is none). max_batch: requests that run together. prefill_chunk: tokens
    of the prompts that are read at once (None: all). context: most tokens of prompt and output (None: the model's own
    max_seq_len; more than that only where its position encoding allows it).
    """

    def __init__(
        self,
        model: DecoderLike,
        *,
        eos_id: int | None = None,
        max_batch: int = 32,
        prefill_chunk: int | None = 1024,
        context: int | None = None,
    ) -> None:
        self.model = model
        self.eos_id = eos_id
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.context = context or model.config.max_seq_len
        if self.context > (model.config.max_context or self.context):
            raise UserError(
                f"context={context} is longer than the model's position table of {model.config.max_seq_len} tokens; "
                "lower it"
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

    @torch.no_grad()
    def _batch(
        self, requests: list[int], prompts: list[Sequence[int]], samplings: list[Sampling], stop: StopCheck | None
    ) -> Iterator[TokenEvent]:
        lengths = [len(prompt) for prompt in prompts]
        limits = [min(s.max_new_tokens, self.context - n) for s, n in zip(samplings, lengths, strict=True)]
        capacity = max(n + limit for n, limit in zip(lengths, limits, strict=True))
        state = self.model.new_state(len(prompts), capacity, dtype=self.dtype, device=self.device)
        sampler = Sampler(samplings, prompts, self.model.config.required_vocab_size(), self.device)
        hidden = self._prefill(prompts, lengths, state)
        positions = torch.tensor(lengths, device=self.device)[:, None]
        made = 0
        while True:
            ids = sampler(self.model.head(hidden))
            made += 1
            going: list[int] = []
            for row, token in enumerate(ids.tolist()):
                finish = self._finish(requests[row], token, made, limits[row], samplings[row], stop)
                if finish is None:
                    going.append(row)
                yield TokenEvent(requests[row], token, finish)
            if not going:
                return
            if len(going) < len(requests):
                index = torch.tensor(going, device=self.device)
                state.reorder(index)
                sampler.keep(going)
                ids, positions = ids[index], positions[index]
                requests = [requests[row] for row in going]
                limits = [limits[row] for row in going]
                samplings = [samplings[row] for row in going]
            hidden = self.model(ids[:, None], SeqInfo(positions=positions), state=state).hidden[:, -1]
            positions = positions + 1

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

    def _prefill(self, prompts: list[Sequence[int]], lengths: list[int], state: object) -> Tensor:
        """Read right-padded prompts into the state; hidden [B, D] of each row's last token."""
        longest = max(lengths)
        chunk = self.prefill_chunk or longest
        ragged = min(lengths) < longest
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : lengths[row]] = torch.as_tensor(prompt)
        tokens = tokens.to(self.device)
        ends = torch.tensor(lengths, device=self.device)
        last: Tensor | None = None
        for start in range(0, longest, chunk):
            part = tokens[:, start : start + chunk]
            positions = torch.arange(start, start + part.shape[1], device=self.device).expand(len(prompts), -1)
            valid = positions < ends[:, None] if ragged else None
            hidden = self.model(part, SeqInfo(positions=positions, valid=valid), state=state).hidden  # type: ignore[arg-type]
            at = ends - 1 - start
            inside = (at >= 0) & (at < part.shape[1])
            here = hidden[torch.arange(len(prompts), device=self.device), at.clamp(0, part.shape[1] - 1)]
            last = here if last is None else torch.where(inside[:, None], here, last)
        assert last is not None
        return last
