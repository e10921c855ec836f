"""Induction heads: go on with a sequence that is being repeated."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from evals.synthetic.base import TASKS, Row, TokenTask, token_row
from llm.core.errors import UserError
from llm.core.registry import About


@TASKS.register(
    "induction",
    tiny=lambda: Induction(length=24, segment=(4, 8), vocab_size=12),
    paper="Olsson et al. 2022, arXiv:2209.11895",
    about=About(
        equation="a b c d a b c d …: after a token that was seen before, answer what came after it then",
        use="The smallest thing that in-context learning needs: find the same token, look one further.",
        weakness="Every mixer with a short convolution or a matching head solves it; it separates little above that.",
    ),
)
class Induction(TokenTask):
    """length: positions in all. segment: the least and the most tokens of the piece that is repeated up to the end, all
    different, in every example of another random length, so that no fixed distance gives the answer."""

    length: int = Field(256, ge=3)
    segment: tuple[int, int] = (16, 64)
    vocab_size: int = Field(128, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Induction:
        low, high = self.segment
        if not 2 <= low <= high <= min(self.vocab_size, self.length - 2):
            raise UserError(
                f"induction: segment {low} to {high} must begin at 2 or more, rise, and fit into vocab_size "
                f"{self.vocab_size} and length {self.length} less 2"
            )
        return self

    @property
    def n_ids(self) -> int:
        return self.vocab_size

    @property
    def n_positions(self) -> int:
        return self.length

    def example(self, rng: Generator) -> Row:
        n = int(rng.integers(self.segment[0], self.segment[1] + 1))
        piece = rng.choice(self.vocab_size, n, replace=False).astype(np.int64)
        repeated = np.resize(piece, self.length + 1)
        return token_row(repeated[:-1], {t: int(repeated[t + 1]) for t in range(n, self.length)})

    def longer(self, n_positions: int) -> Induction:
        return self.replace(length=n_positions)

    def chance(self) -> float:
        """One of the tokens of the piece: expected over its length, each weighted by its number of answers."""
        lengths = range(self.segment[0], self.segment[1] + 1)
        return sum((self.length - n) / n for n in lengths) / sum(self.length - n for n in lengths)

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        answers = np.zeros_like(tokens)
        after: dict[int, int] = {}
        for t, token in enumerate(tokens.tolist()):
            if t:
                after[int(tokens[t - 1])] = token
            answers[t] = after.get(token, 0)
        return answers
