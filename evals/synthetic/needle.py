"""A needle in a haystack: one fact anywhere in a long text, asked for at its end."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from evals.synthetic.base import TASKS, Row, TokenTask, token_row
from llm.core.errors import UserError
from llm.core.registry import About

FACT, ASK = 0, 1
SENTENCE = 8


@TASKS.register(
    "needle",
    tiny=lambda: Needle(length=32, n_digits=2, n_keys=3, n_words=7),
    paper="after S-NIAH in Hsieh et al. 2024, arXiv:2404.06654",
    about=About(
        equation="… fact key d₁ … d_n …, at the end: ask key, answer d₁ … d_n one after another",
        use="Whether a fact survives a long stretch of what does not matter, wherever it stands.",
        weakness="With one fact a state of a few numbers would do; raise n_facts to ask for capacity.",
    ),
)
class Needle(TokenTask):
    """length: positions in all. n_digits: length of the answer, ten digits to choose from; the examined model reads the
    right digits as it goes on. n_facts: facts in the text, one of them asked for. n_keys: names that facts can have.
    haystack: repeat (one sentence again and again) or random, of n_words words."""

    group_name: ClassVar[str] = "tenth of the text"
    length: int = Field(256, ge=8)
    n_digits: int = Field(4, ge=1)
    n_facts: int = Field(1, ge=1)
    n_keys: int = Field(16, ge=1)
    n_words: int = Field(32, ge=1)
    haystack: Literal["repeat", "random"] = "random"

    @model_validator(mode="after")
    def _fits(self) -> Needle:
        needed = self.n_facts * self.fact_length + self.n_digits + 1
        if needed > self.length or self.n_facts > self.n_keys:
            raise UserError(
                f"needle: {self.n_facts} facts of {self.n_digits} digits need a length of at least {needed} (given "
                f"{self.length}) and as many n_keys (given {self.n_keys})"
            )
        return self

    @property
    def n_ids(self) -> int:
        return 12 + self.n_keys + self.n_words

    @property
    def n_positions(self) -> int:
        return self.length

    @property
    def fact_length(self) -> int:
        """Tokens of a fact: its mark, its key and its digits."""
        return 2 + self.n_digits

    def example(self, rng: Generator) -> Row:
        """Ids: fact mark, ask mark, digits 2..11, then keys, then words."""
        first_word = 12 + self.n_keys
        n_text = self.length - self.n_digits - 1
        tokens = np.empty(self.length, dtype=np.int64)
        size = SENTENCE if self.haystack == "repeat" else n_text
        tokens[:n_text] = np.resize(first_word + rng.integers(self.n_words, size=size), n_text)
        keys = 12 + rng.choice(self.n_keys, self.n_facts, replace=False)
        digits = 2 + rng.integers(10, size=(self.n_facts, self.n_digits))
        # Facts do not overlap: places among what is left of the text when each fact counts as one token.
        slots = n_text - self.n_facts * (self.fact_length - 1)
        places = np.sort(rng.choice(slots, self.n_facts, replace=False))
        places = places + np.arange(self.n_facts) * (self.fact_length - 1)
        for place, key, answer in zip(places, keys, digits, strict=True):
            tokens[place : place + self.fact_length] = [FACT, key, *answer]
        asked = int(rng.integers(self.n_facts))
        answer = digits[asked].tolist()
        tokens[n_text:] = [ASK, keys[asked], *answer[:-1]]
        answers = {n_text + 1 + i: digit for i, digit in enumerate(answer)}
        return token_row(tokens, answers, int(10 * places[asked] // (n_text - self.fact_length + 1)))

    def longer(self, n_positions: int) -> Needle:
        return self.replace(length=n_positions)

    def chance(self) -> float:
        """Any of the ten digits."""
        return 0.1

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.zeros_like(tokens)
        n_text = len(tokens) - self.n_digits - 1
        for t in np.flatnonzero(tokens[:n_text] == FACT).tolist():
            if tokens[t + 1] == tokens[n_text + 1]:
                answers[n_text + 1 :] = tokens[t + 2 : t + self.fact_length]
        return answers
