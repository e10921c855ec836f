"""Samples of BABILong: facts scattered, in order, between sentences of other text, to an exact number of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random
from typing import Literal

import numpy as np

from evals.babilong.background import Background
from evals.babilong.story import Sample, read_samples
from evals.babilong.worlds import simulate_sample
from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer

Split = Literal["train", "test"]
MOST_TRIES = 2000
TEST_SHARE = 1 / 8
"""Of the simulated fact lists, by their hash, those that are for tests alone."""


@dataclass(frozen=True)
class Hidden:
    """A question whose facts are hidden in `n_tokens` tokens of context.

    facts: tokens of each, with the blank before it. slots: for each the number of background sentences before it.
    passages: stretches of background sentences; n_background tokens of them are used.
    """

    sample: Sample
    background: Background | None
    facts: tuple[np.ndarray, ...]
    slots: tuple[int, ...]
    passages: tuple[tuple[int, int], ...]
    n_background: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the context."""
        return self.n_background + sum(map(len, self.facts))

    def pieces(self) -> Iterator[tuple[np.ndarray, int | None]]:
        """Tokens of one sentence after another, and the number of the fact that it is, or None."""
        left, place, fact = self.n_background, 0, 0
        for number in (n for first, end in self.passages for n in range(first, end)):
            while fact < len(self.facts) and self.slots[fact] == place:
                yield self.facts[fact], fact
                fact += 1
            assert self.background is not None
            ids = self.background.sentence(number)[:left]
            left -= len(ids)
            place += 1
            yield ids, None
        for rest in range(fact, len(self.facts)):
            yield self.facts[rest], rest

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        """The context in parts of `size` tokens, the last one shorter; no more of it than that is held at once."""
        held: list[np.ndarray] = []
        n_held = 0
        for ids, _ in self.pieces():
            held.append(ids)
            n_held += len(ids)
            while n_held >= size:
                joined = np.concatenate(held)
                yield joined[:size]
                held, n_held = [joined[size:]], n_held - size
        if n_held:
            yield np.concatenate(held)

    @cached_property
    def depths(self) -> tuple[float, ...]:
        """Where the supporting facts begin: 0 at the start of the context, 1 at its end."""
        at, found = 0, {}
        for ids, fact in self.pieces():
            if fact is not None:
                found[fact] = at / self.n_tokens
            at += len(ids)
        return tuple(found[fact] for fact in self.sample.support)


class Sampler:
    """Makes the samples of a task at a length: sample `index` is a function of the arguments and of nothing else.

    n_context: tokens of each context exactly; 0: the facts alone. window: the part of the background in which the facts
    may lie. facts: folder of real bAbI files; None: simulated ones, of which the lists for tests and for training
    differ, whatever the seeds.
    """

    def __init__(
        self,
        task: str,
        n_context: int,
        tokenizer: Tokenizer,
        background: Background | None,
        *,
        split: Split = "test",
        seed: int = 0,
        window: tuple[float, float] = (0.0, 1.0),
        facts: str | None = None,
    ) -> None:
        assert n_context == 0 or background is not None
        if not 0 <= window[0] <= window[1] <= 1:
            raise UserError(f"the window {window[0]:g} to {window[1]:g} must lie within 0 to 1")
        if facts is not None and split == "train":
            raise UserError("real bAbI files are for tests; training data are made of simulated facts")
        self.task, self.n_context, self.tokenizer, self.background = task, n_context, tokenizer, background
        self.split, self.seed, self.window, self.facts = split, seed, window, facts
        self._key = f"{split}/{task}/{n_context}/{window[0]:g}-{window[1]:g}/{seed}"
        self._real: list[int] | None = None
        if facts is not None:
            samples = _real_samples(facts, task)
            self._real = [n for n, sample in enumerate(samples) if self._encoded(sample) is not None]
            Random(f"order/{task}/{seed}").shuffle(self._real)
            if not self._real:
                raise UserError(f"no sample of {task} in {facts} fits in {n_context} tokens; give a greater length")

    def __len__(self) -> int:
        """Number of different samples of real files; of simulated ones there is no end."""
        assert self._real is not None
        return len(self._real)

    def __getitem__(self, index: int) -> Hidden:
        """Sample `index`."""
        sample, facts = self._find(index)
        n_background = self.n_context - sum(map(len, facts)) if self.n_context else 0
        if not n_background:
            return Hidden(sample, None, facts, (0,) * len(facts), (), 0)
        assert self.background is not None
        rng = Random(f"hide/{self._key}/{index}")
        passages = self.background.passages(rng, n_background)
        n_sentences = sum(end - first for first, end in passages)
        low, high = (int(edge * n_sentences) for edge in self.window)
        slots = sorted(rng.randint(low, high) for _ in facts)
        return Hidden(sample, self.background, facts, tuple(slots), tuple(passages), n_background)

    def _find(self, index: int) -> tuple[Sample, tuple[np.ndarray, ...]]:
        if self._real is not None:
            assert self.facts is not None
            if index >= len(self._real):
                raise UserError(
                    f"{self.task} has {len(self._real)} real samples that fit in {self.n_context} tokens; "
                    f"{index + 1} were asked for"
                )
            sample = _real_samples(self.facts, self.task)[self._real[index]]
            encoded = self._encoded(sample)
            assert encoded is not None
            return sample, encoded
        for attempt in range(MOST_TRIES):
            sample = simulate_sample(self.task, self.seed, index + (attempt << 40))
            if for_tests(sample.facts) == (self.split == "test") and (encoded := self._encoded(sample)) is not None:
                return sample, encoded
        raise UserError(
            f"no simulated sample of {self.task} in {MOST_TRIES} fits in {self.n_context} tokens; give a greater length"
        )

    def _encoded(self, sample: Sample) -> tuple[np.ndarray, ...] | None:
        """Tokens of the facts; None where they are more than an eighth of the context's tokens, or fill it."""
        if self.n_context and len(sample.facts) > self.n_context / 8:
            return None
        flat, lengths = self.tokenizer.encode_flat([f" {fact}" for fact in sample.facts])
        if self.n_context and len(flat) >= self.n_context:
            return None
        return tuple(np.split(flat.astype(np.int32), lengths.cumsum()[:-1]))


def for_tests(facts: Sequence[str]) -> bool:
    """Whether a list of simulated facts is for tests alone."""
    digest = hashlib.blake2b("\n".join(facts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2.0**64


@lru_cache(maxsize=20)
def _real_samples(folder: str, task: str) -> list[Sample]:
    return read_samples(folder, task)
