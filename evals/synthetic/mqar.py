"""Multi-query associative recall."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from evals.synthetic.base import TASKS, Row, TokenTask, token_row
from llm.core.errors import UserError
from llm.core.registry import About


@TASKS.register(
    "mqar",
    tiny=lambda: MQAR(length=24, n_pairs=[2, 4], vocab_size=17),
    paper="Arora et al. 2023, arXiv:2312.04927",
    about=About(
        equation="k₁ v₁ … k_n v_n, then every key once more, in any order: answer its value",
        use="How many pairs a mixer can hold and find again, which is where recurrent states fall behind.",
        weakness="Keys are single tokens and written once; see rewrite for keys whose value changes.",
    ),
)
class MQAR(TokenTask):
    """length: positions in all: the pairs, then the queries at random places among filler (token 0).
    n_pairs: number of pairs, drawn for each example from this list. vocab_size: filler, half keys, half values."""

    group_name: ClassVar[str] = "pairs"
    length: int = Field(256, ge=4)
    n_pairs: list[int] = Field([16, 32, 64], min_length=1)
    vocab_size: int = Field(8192, ge=5)

    @model_validator(mode="after")
    def _fits(self) -> MQAR:
        most = max(self.n_pairs)
        if min(self.n_pairs) < 1 or 3 * most > self.length or most > min(self.n_keys, self.n_values):
            raise UserError(
                f"mqar: {most} pairs need a length of at least {3 * most} (given {self.length}) and a vocab_size of at "
                f"least {2 * most + 1} (given {self.vocab_size}); n_pairs must be positive"
            )
        return self

    @property
    def n_ids(self) -> int:
        return self.vocab_size

    @property
    def n_positions(self) -> int:
        return self.length

    @property
    def n_keys(self) -> int:
        """Keys are tokens 1 .. n_keys, values the ids behind them."""
        return (self.vocab_size - 1) // 2

    @property
    def n_values(self) -> int:
        """Number of values."""
        return self.vocab_size - 1 - self.n_keys

    def example(self, rng: Generator) -> Row:
        n = int(rng.choice(self.n_pairs))
        keys = 1 + rng.choice(self.n_keys, n, replace=False)
        values = 1 + self.n_keys + rng.choice(self.n_values, n, replace=False)
        tokens = np.zeros(self.length, dtype=np.int64)
        tokens[: 2 * n : 2], tokens[1 : 2 * n : 2] = keys, values
        places = 2 * n + rng.choice(self.length - 2 * n, n, replace=False)
        tokens[places] = keys
        return token_row(tokens, dict(zip(places.tolist(), values.tolist(), strict=True)), n)

    def longer(self, n_positions: int) -> MQAR:
        return self.replace(length=n_positions)

    def chance(self) -> float:
        return len(self.n_pairs) / sum(self.n_pairs)

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.zeros_like(tokens)
        value_of: dict[int, int] = {}
        for t, token in enumerate(tokens.tolist()):
            if token in value_of:
                answers[t] = value_of[token]
            elif 1 <= token <= self.n_keys:
                value_of[token] = int(tokens[t + 1])
        return answers
