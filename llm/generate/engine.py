"""Engine: batched generation of token ids. The model's past lives in its DecodeState and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch

from llm.core.errors import UserError
from llm.core.state import DecodeState, Pages
from llm.generate.decode_step import CompiledStep, PlainStep, Step
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import Drafter
from llm.generate.events import Completion, Speculation, TokenEvent
from llm.generate.prefill import Prompt, PromptStream
from llm.generate.prefix import Prefix, fingerprint
from llm.generate.prefix_cache import PAGES_BETWEEN_SAVES, saves_states
from llm.generate.sampling import Sampling
from llm.generate.scheduler import Scheduler
from llm.models.decoder import DecoderLike

CacheKind = Literal["auto", "contiguous", "paged"]
StopCheck = Callable[[int, int], bool]
"""(request, token) -> whether the output ends with this token; called once for each token, in order."""


class Engine:
    """Continues prompts with a model.

    eos_id: token that ends a text (None: there is none). max_batch: requests that run together; waiting ones take the
    places of those that end, when all of them find one or a quarter is free. prefill_chunk: tokens
    of the prompts that are read at once (None: all). context: most tokens of prompt and output (None: the model's own
    max_seq_len; more than that only where its parts allow it). drafter: speculative decoding, whose
    outputs have the same law, and are the same when greedy; draft_length: tokens that it drafts at once. prefix: a text
    that was read before, with which every prompt begins. compile: the steps of decoding, of checking drafts and of the
    drafter's model are compiled at first use, which takes some seconds each.

    cache: how keys and values are held: contiguous, row by row; paged, in pages of page_size tokens, so that requests
    join a batch without a copy of it; auto takes pages where prefix_cache needs them. prefix_cache: bytes of pages and
    of saved states that are kept for prompts which begin as others did, and then only read the rest (0: none).
    `saves_states`: the model's past is not in keys and values alone; what else it remembers is saved after every
    `saved_every` tokens of a prompt, which is then read in chunks of so many, and shared from there.
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
        compile: bool = False,
        cache: CacheKind = "auto",
        page_size: int = 16,
        prefix_cache: int = 0,
    ) -> None:
        self.model = model
        self.drafter, self.draft_length = drafter, draft_length or DraftLength()
        self.step: Step = PlainStep(model)
        if compile:
            self.step = CompiledStep(model, () if drafter is None else self.draft_length.lengths())
        if compile and drafter is not None:
            drafter.compile()
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
        longest = model.config.max_context or max(context or 0, model.config.max_seq_len)
        self.context = context or min(longest, model.config.max_seq_len)
        if self.context > longest:
            raise UserError(f"context={context} is more than the {longest} tokens that the model can read; lower it")
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
        self.page_size, self.prefix_cache = page_size, prefix_cache
        if prefix_cache and cache == "contiguous":
            raise UserError("prefix_cache shares pages, which cache=contiguous has not; set cache=paged or auto")
        if prefix_cache and prefix is not None:
            raise UserError("a saved state and prefix_cache are not used together; leave one of them out")
        self.paged = cache == "paged" or prefix_cache > 0
        if compile and self.paged:
            raise UserError("compile is for contiguous caches; leave it out, or prefix_cache and cache=paged")
        self.saves_states = prefix_cache > 0 and saves_states(self.new_state(1, Pages(page_size)))
        self.saved_every = page_size
        if self.saves_states:
            n_pages = PAGES_BETWEEN_SAVES if prefill_chunk is None else prefill_chunk // page_size
            self.saved_every = self.prefill_chunk = page_size * max(1, min(PAGES_BETWEEN_SAVES, n_pages))

    def new_state(self, batch: int, pages: Pages | None = None) -> DecodeState:
        """An empty state for so many requests, its keys and values in `pages`. All have the same capacity: states of
        one kind can be put together, and what is not needed is not held."""
        n_tentative = self.draft_length.most + 1 if self.drafter is not None else 0
        state = self.model.new_state(batch, self.context, n_tentative=n_tentative, dtype=self.dtype, device=self.device)
        return state if pages is None else pages.of(state)

    def generate(
        self,
        prompts: Sequence[Prompt],
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
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        *,
        stop: StopCheck | None = None,
        scheduler: Scheduler | None = None,
    ) -> Iterator[TokenEvent]:
        """Tokens of all requests as they come. sampling: one for all, or one for each prompt. scheduler: one of this
        engine that is idle; what it knows of earlier prompts is not read again.

        UserError when a prompt is empty, holds an id outside the vocabulary or leaves no room for a new token.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        assert len(samplings) == len(prompts), "one Sampling for each prompt"
        for number, prompt in enumerate(prompts):
            self.check(prompt, f"prompt {number}")
        scheduler = scheduler or Scheduler(self)
        requests: dict[int, int] = {}
        # Prompts of like length are read together with little padding.
        for place in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            ends = None if stop is None else partial(stop, place)
            requests[scheduler.submit(prompts[place], samplings[place], stop=ends)] = place
        while scheduler.n_waiting or scheduler.n_running:
            for event in scheduler.step():
                yield event._replace(request=requests[event.request])

    def warm_up(self) -> None:
        """Compile what the first answers need: the steps of one row and of several, those of drafts included."""
        prompt = [0] * min(4, self.context - 1) if self.prefix is None else list(self.prefix.tokens)
        n_tokens = 3 if self.drafter is None else 3 + 2 * self.draft_length.most
        widths = [] if self.drafter is None else [width for width in self.step.widths if width <= self.context]
        # What a length costs is not learned from the time that the compiler takes.
        own = self.draft_length
        self.draft_length = DraftLength(own.most, adaptive=own.adaptive)
        for n in {1, min(3, self.max_batch)}:
            self.generate([prompt] * n, Sampling(temperature=0, max_new_tokens=n_tokens, ignore_eos=True))
            for width in widths:
                state = self.new_state(n)
                state.begin(width)
                with torch.no_grad():
                    self.step(torch.zeros(n, width, dtype=torch.int64, device=self.device), None, state)
        self.draft_length, self.speculation = own, Speculation()

    def check(self, prompt: Prompt, name: str) -> None:
        """UserError, in which the prompt has this name, when it cannot be continued."""
        vocab = self.model.config.required_vocab_size()
        if not len(prompt):
            raise UserError(f"{name} has no tokens; give at least one")
        if isinstance(prompt, PromptStream):
            if self.prefix is not None or self.drafter is not None:
                raise UserError("a prompt that is streamed goes with neither a saved state nor speculative decoding")
        elif min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(
                f"{name} holds token id {max(prompt) if min(prompt) >= 0 else min(prompt)}; "
                f"the model's ids are 0 to {vocab - 1}: is this the tokenizer that the model was trained with?"
            )
        if len(prompt) >= self.context:
            raise UserError(
                f"{name} has {len(prompt)} tokens and the model's context is {self.context}, which leaves no "
                f"room for new ones; shorten it to at most {self.context - 1} tokens"
            )
        if self.prefix is not None and not isinstance(prompt, PromptStream):
            self.prefix.check(prompt, name)
