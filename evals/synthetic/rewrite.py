"""Rewrite: the latest value of a key that was written several times."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from evals.synthetic.base import TASKS, Row, TokenTask, token_row
from llm.core.errors import UserError
from llm.core.registry import About


@TASKS.register(
    "rewrite",
    tiny=lambda: Rewrite(length=24, n_keys=3, n_writes=8, vocab_size=20),
    paper="Rodkin et al. 2024, arXiv:2407.04841",
    about=About(
        equation="k v k' v' k v'' …, then every key once more: answer the value that was written to it last",
        use="Whether a memory replaces what it holds: a sum of outer products does not, a delta rule does.",
        weakness="A mixer that finds the latest occurrence by position needs no memory that can be rewritten.",
    ),
)
class Rewrite(TokenTask):
    """n_writes: key-value pairs in all, over n_keys keys, each of which is written at least once. length: positions in
    all: filler (token 0), the writes, one query per key. vocab_size: filler, half keys, half values."""

    group_name: ClassVar[str] = "writes to the key"
    length: int = Field(128, ge=3)
    n_keys: int = Field(8, ge=1)
    n_writes: int = Field(32, ge=1)
    vocab_size: int = Field(64, ge=3)

    @model_validator(mode="after")
    def _fits(self) -> Rewrite:
        needed = 2 * self.n_writes + self.n_keys
        if self.n_keys > min(self.n_writes, self.n_key_ids) or needed > self.length:
            raise UserError(
                f"rewrite: {self.n_writes} writes over {self.n_keys} keys need a length of at least {needed} (given "
                f"{self.length}), n_writes >= n_keys, and vocab_size {self.vocab_size} holds only {self.n_key_ids} keys"
            )
        return self

    @property
    def n_ids(self) -> int:
        return self.vocab_size

    @property
    def n_key_ids(self) -> int:
        """Keys are tokens 1 .. n_key_ids, values the ids behind them."""
        return (self.vocab_size - 1) // 2

    @property
    def n_positions(self) -> int:
        return self.length

    def example(self, rng: Generator) -> Row:
        keys = 1 + rng.choice(self.n_key_ids, self.n_keys, replace=False)
        again = rng.integers(self.n_keys, size=self.n_writes - self.n_keys)
        written = rng.permutation(np.concatenate([np.arange(self.n_keys), again]))
        values = rng.integers(1 + self.n_key_ids, self.vocab_size, size=self.n_writes)
        latest = dict(zip(written.tolist(), values.tolist(), strict=True))
        tokens = np.zeros(self.length, dtype=np.int64)
        first_query = self.length - self.n_keys
        start = first_query - 2 * self.n_writes
        tokens[start:first_query:2], tokens[start + 1 : first_query : 2] = keys[written], values
        order = rng.permutation(self.n_keys)
        tokens[first_query:] = keys[order]
        groups = np.full(self.length, -1, dtype=np.int64)
        groups[first_query:] = np.bincount(written, minlength=self.n_keys)[order]
        return token_row(tokens, {first_query + i: latest[key] for i, key in enumerate(order.tolist())}, groups)

    def longer(self, n_positions: int) -> Rewrite:
        return self.replace(length=n_positions)

    def chance(self) -> float:
        return 1 / self.n_writes + (1 - 1 / self.n_writes) / (self.vocab_size - 1 - self.n_key_ids)

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.zeros_like(tokens)
        first_query = len(tokens) - self.n_keys
        latest: dict[int, int] = {}
        for t in range(first_query - 2 * self.n_writes, first_query, 2):
            latest[int(tokens[t])] = int(tokens[t + 1])
        answers[first_query:] = [latest[key] for key in tokens[first_query:].tolist()]
        return answers
