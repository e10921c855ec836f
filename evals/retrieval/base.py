"""Samples of retrieval tasks: each a function of (seed, task, length, index), as long as it can be within its length.

Shapes of a prompt: an announcement, a haystack of `units` (lines or sentences) with what is to be found among them, a
question, and the beginning of the answer. All wording is this project's own; only the needle sentence is RULER's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator, Philox

from evals.retrieval.text import Background
from llm.core.errors import UserError
from llm.core.init import name_seed
from llm.data.tokenizer import Tokenizer
from llm.generate.text import encode_prompt

N_DEPTHS = 40


@dataclass(frozen=True)
class Hidden:
    """A line that is to be found. depth: share of the units before it. at: its first character in the prompt."""

    text: str
    depth: float
    at: int = -1


@dataclass(frozen=True)
class Draft:
    """A sample of `n_units` background units. background: the units; hidden: the first is asked for."""

    intro: str
    units: Sequence[str]
    hidden: Sequence[Hidden]
    question: str
    answers: Sequence[str]
    separator: str = "\n"

    def prompt(self) -> tuple[str, list[Hidden]]:
        """(text, what is hidden in the order of the text with its place)."""
        order = sorted(range(len(self.hidden)), key=lambda i: place_of(self.hidden[i].depth, len(self.units)))
        parts: list[str] = []
        placed: list[Hidden] = []
        n_chars = len(self.intro) + len(self.separator)
        done = 0
        for index in order:
            one = self.hidden[index]
            upto = place_of(one.depth, len(self.units))
            for text in self.units[done:upto]:
                parts.append(text)
                n_chars += len(text) + len(self.separator)
            done = upto
            placed.append(Hidden(one.text, one.depth, n_chars))
            parts.append(one.text)
            n_chars += len(one.text) + len(self.separator)
        parts += self.units[done:]
        return self.separator.join([self.intro, *parts, self.question]), placed


@dataclass(frozen=True)
class Sample:
    """id: of the results. ids: the prompt's tokens, the one that starts documents before them. depth: of the first
    thing that is asked for, None where there is none."""

    id: str
    task: str
    length: int
    index: int
    prompt: str
    ids: list[int] = field(repr=False)
    answers: list[str]
    hidden: list[Hidden]
    depth: float | None
    n_units: int


Make = Callable[[Generator, int, Background, float | None], Draft]
"""(random numbers, number of background units, background, depth of what is asked first or None: drawn) -> draft."""


@dataclass(frozen=True)
class Task:
    """make: a draft. max_new_tokens: of the answer; they count as part of the length. least: background units. most:
    units that a background is enough for; None: any number. has_depth: whether what is asked for stands at a depth."""

    name: str
    make: Make
    max_new_tokens: int = 128
    least: int = 0
    most: Callable[[Background], int] | None = None
    has_depth: bool = True


def place_of(depth: float, n_units: int) -> int:
    """Units that stand before a line at this depth."""
    return int(round(depth * n_units))


def draw_depths(rng: Generator, n: int) -> list[float]:
    """n of 40 depths at even distances from 0 to 1, no two the same."""
    return [float(i) / (N_DEPTHS - 1) for i in rng.choice(N_DEPTHS, n, replace=False)]


class Sampler:
    """Samples of tasks for a tokenizer. depths: where what is asked first stands, one after another; None: drawn."""

    def __init__(
        self, tokenizer: Tokenizer, background: Background, *, seed: int = 42, depths: Sequence[float] | None = None
    ) -> None:
        self.tokenizer, self.background, self.seed, self.depths = tokenizer, background, seed, depths
        self._sizes: dict[tuple[str, int], int] = {}

    def __call__(self, task: Task, length: int, index: int) -> Sample:
        """Sample `index` with at most `length` tokens, answer included. UserError where the task does not fit."""
        if (task.name, length) not in self._sizes:
            self._sizes[task.name, length] = self._largest(task, length, 0, 1)
        n = self._largest(task, length, index, self._sizes[task.name, length])
        draft, prompt, hidden, ids = self._try(task, length, index, n)
        assert len(ids) + task.max_new_tokens <= length
        asked = draft.hidden[0].depth if draft.hidden and task.has_depth else None
        name = f"{task.name}/{length}/{index}"
        return Sample(name, task.name, length, index, prompt, ids, list(draft.answers), hidden, asked, n)

    def _try(self, task: Task, length: int, index: int, n: int) -> tuple[Draft, str, list[Hidden], list[int]]:
        key = np.array([name_seed(self.seed, f"retrieval/{task.name}/{length}"), index], dtype=np.uint64)
        depth = None if self.depths is None else self.depths[index % len(self.depths)]
        draft = task.make(Generator(Philox(key=key)), n, self.background, depth)
        prompt, hidden = draft.prompt()
        return draft, prompt, hidden, encode_prompt(self.tokenizer, prompt)

    def _largest(self, task: Task, length: int, index: int, guess: int) -> int:
        """The most background units with which a sample fits, looked for from `guess` on."""
        sizes: dict[int, int] = {}

        def fits(n: int) -> bool:
            if n not in sizes:
                sizes[n] = len(self._try(task, length, index, n)[3]) + task.max_new_tokens
            return sizes[n] <= length

        most = None if task.most is None else task.most(self.background)
        low = max(guess, task.least)
        low, step = (low if most is None else min(low, most)), max(1, guess // 16)
        high = low
        while fits(high):
            if high == most:
                raise UserError(
                    f"the background has too few words for {task.name} in {length} tokens: they fill only "
                    f"{sizes[high]}; give larger texts with essays= or leave out this length"
                )
            low, high, step = high, high + step, 2 * step
            high = high if most is None else min(high, most)
        while not fits(low):
            if low == task.least:
                raise UserError(
                    f"{task.name} does not fit into {length} tokens: its shortest prompt and answer take {sizes[low]}; "
                    "use longer lengths"
                )
            low, high, step = max(task.least, low - step), low, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
