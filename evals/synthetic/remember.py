"""Remember: key-value pairs, one in each of the first segments, then nothing that matters, then the question."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from evals.synthetic.base import TASKS, Row, TokenTask, token_row
from llm.core.errors import UserError
from llm.core.registry import About

PAIR, ASK = 0, 1


@TASKS.register(
    "remember",
    tiny=lambda: Remember(length=24, n_symbols=5, n_pairs=2),
    paper="after associative retrieval in Rodkin et al. 2024, arXiv:2407.04841",
    about=About(
        equation="… pair k₁ k₂ v … in each of the first segments, filler, at the end: ask k₁ k₂, answer v",
        use="Whether a memory carried from segment to segment keeps what it took in: long (filler) and much (pairs).",
        weakness="With one pair a few numbers would do; many pairs need a curriculum of many thousand steps.",
    ),
)  # fmt: skip
class Remember(TokenTask):
    """length: positions in all. segment: each of the first n_pairs stretches of this length holds one pair, anywhere
    in it. key_length: symbols of a key, of n_symbols to choose from; there are as many values and words of filler."""

    group_name: ClassVar[str] = "pair asked for"
    length: int = Field(48, ge=4)
    segment: int = Field(8, ge=3)
    n_pairs: int = Field(1, ge=1)
    key_length: int = Field(2, ge=1)
    n_symbols: int = Field(16, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Remember:
        needed = self.n_pairs * self.segment + self.key_length + 1
        n_keys = self.n_symbols**self.key_length
        if needed > self.length or self.key_length + 2 > self.segment or self.n_pairs > n_keys:
            raise UserError(
                f"remember: {self.n_pairs} pairs in segments of {self.segment} need a length of at least {needed} "
                f"(given {self.length}), segments of at least {self.key_length + 2}, and as many keys (there are "
                f"{n_keys})"
            )
        return self

    @property
    def n_ids(self) -> int:
        return 2 + 3 * self.n_symbols

    @property
    def n_positions(self) -> int:
        return self.length

    def example(self, rng: Generator) -> Row:
        """Ids: pair mark, ask mark, then key symbols, values, filler."""
        first_value, first_filler = 2 + self.n_symbols, 2 + 2 * self.n_symbols
        tokens = first_filler + rng.integers(self.n_symbols, size=self.length)
        numbers = rng.choice(self.n_symbols**self.key_length, self.n_pairs, replace=False)
        keys = [[2 + int(n) // self.n_symbols**i % self.n_symbols for i in range(self.key_length)] for n in numbers]
        values = first_value + rng.integers(self.n_symbols, size=self.n_pairs)
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            at = index * self.segment + int(rng.integers(self.segment - self.key_length - 1))
            tokens[at : at + self.key_length + 2] = [PAIR, *key, value]
        asked = int(rng.integers(self.n_pairs))
        tokens[-1 - self.key_length :] = [ASK, *keys[asked]]
        return token_row(tokens, {self.length - 1: int(values[asked])}, asked)

    def longer(self, n_positions: int) -> Remember:
        return self.replace(length=n_positions)

    def chance(self) -> float:
        """Any of the values."""
        return 1 / self.n_symbols

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.zeros_like(tokens)
        key = tokens[len(tokens) - self.key_length :]
        for t in np.flatnonzero(tokens == PAIR).tolist():
            if np.array_equal(tokens[t + 1 : t + 1 + self.key_length], key):
                answers[-1] = tokens[t + 1 + self.key_length]
        return answers
