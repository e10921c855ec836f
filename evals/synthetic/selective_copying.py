"""Selective copying: remember what is not filler, in order."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from evals.synthetic.base import TASKS, Row, TokenTask, token_row
from llm.core.errors import UserError
from llm.core.registry import About

FILLER, ASK = 0, 1


@TASKS.register(
    "selective_copying",
    tiny=lambda: SelectiveCopying(length=20, n_data=4, vocab_size=6),
    paper="Gu and Dao 2023, arXiv:2312.00752",
    about=About(
        equation="data tokens at random places among filler, then n marks: answer the data tokens in order",
        use="Whether a mixer decides by content what to keep; time-invariant filters fail.",
        weakness="The state needs only n tokens; nothing is looked up by key.",
    ),
)
class SelectiveCopying(TokenTask):
    """length: positions in all, the last n_data of them marks that ask. vocab_size: filler, mark and data tokens."""

    group_name: ClassVar[str] = "place in the answer"
    length: int = Field(256, ge=2)
    n_data: int = Field(16, ge=1)
    vocab_size: int = Field(18, ge=4)

    @model_validator(mode="after")
    def _fits(self) -> SelectiveCopying:
        if 2 * self.n_data > self.length:
            raise UserError(
                f"selective_copying: n_data {self.n_data} needs a length of at least {2 * self.n_data} "
                f"(given {self.length})"
            )
        return self

    @property
    def n_ids(self) -> int:
        return self.vocab_size

    @property
    def n_positions(self) -> int:
        return self.length

    def example(self, rng: Generator) -> Row:
        n, first_mark = self.n_data, self.length - self.n_data
        places = np.sort(rng.choice(first_mark, n, replace=False))
        tokens = np.full(self.length, FILLER, dtype=np.int64)
        tokens[places] = 2 + rng.integers(self.vocab_size - 2, size=n)
        data = tokens[places]
        tokens[first_mark:] = ASK
        groups = np.full(self.length, -1, dtype=np.int64)
        groups[first_mark:] = 1 + np.arange(n)
        return token_row(tokens, {first_mark + i: int(data[i]) for i in range(n)}, groups)

    def longer(self, n_positions: int) -> SelectiveCopying:
        return self.replace(length=n_positions)

    def chance(self) -> float:
        return 1 / self.n_data + (1 - 1 / self.n_data) / (self.vocab_size - 2)

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.zeros_like(tokens)
        answers[len(tokens) - self.n_data :] = tokens[tokens > ASK][: self.n_data]
        return answers
