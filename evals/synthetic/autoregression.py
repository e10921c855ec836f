"""AR(q): a vector sequence in which each term is a linear function of a representation of the last q."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from evals.synthetic.base import TASKS, Row, TaskConfig, VectorTask
from evals.synthetic.representation import Representation, prefix_ridge, representation
from llm.core.errors import UserError
from llm.core.registry import About


@TASKS.register(
    "ar",
    tiny=lambda: Autoregression(d=2, q=2, length=12, d_representation=6),
    paper="Gao et al. 2024, arXiv:2402.13572",
    about=About(
        equation="x_{t+1} = A Φ(x_{t−q+1}, …, x_t) + noise, A new in each sequence: at t answer x_{t+1}",
        use="In-context learning where the model must first gather the last q vectors.",
        weakness="Far from language; chaotic for some A, so errors are measured one step ahead only.",
    ),
)
class Autoregression(VectorTask):
    """d: width of x. q: order. length: positions. d_representation: width of Phi, a fixed random network of two layers
    whose output is scaled to unit root mean square, which keeps every sequence bounded; A is N(0, 1 / width).
    noise: its standard deviation. Answers count from the q-th position on."""

    group_name: ClassVar[str] = "terms seen"
    d: int = Field(20, ge=1)
    q: int = Field(3, ge=1)
    length: int = Field(40, ge=2)
    d_representation: int = Field(20, ge=1)
    noise: float = Field(0.0, ge=0)
    representation_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Autoregression:
        if self.q >= self.length:
            raise UserError(f"ar: q {self.q} must be below length {self.length}")
        return self

    @property
    def d_in(self) -> int:
        return self.d

    @property
    def d_out(self) -> int:
        return self.d

    @property
    def n_positions(self) -> int:
        return self.length

    def representation(self) -> Representation:
        """Phi of q stacked terms."""
        return representation(self.q * self.d, self.d_representation, self.representation_seed, normalised=True)

    def example(self, rng: Generator) -> Row:
        phi = self.representation()
        weights = rng.standard_normal((self.d_representation, self.d)) / np.sqrt(self.d_representation)
        noise = self.noise * rng.standard_normal((self.length + 1, self.d))
        x = np.empty((self.length + 1, self.d))
        x[: self.q] = rng.standard_normal((self.q, self.d))
        for t in range(self.q, self.length + 1):
            x[t] = phi(x[t - self.q : t].reshape(-1)) @ weights + noise[t]
        positions = np.arange(self.length)
        asked = positions >= self.q - 1
        return Row(x[:-1].astype(np.float32), x[1:].astype(np.float32), asked, positions + 1)

    def longer(self, n_positions: int) -> TaskConfig:
        return self.replace(length=n_positions)

    def oracles(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Least squares and ridge (the best possible) on the true Phi of the terms so far."""
        x = inputs.astype(np.float64)
        first = self.q - 1
        stacked = np.concatenate([x[:, i : x.shape[1] - first + i] for i in range(self.q)], axis=-1)
        features = self.representation()(stacked)
        following = np.zeros((*features.shape[:2], self.d))
        following[:, :-1] = x[:, self.q :]
        found = {}
        penalty = self.noise**2 * self.d_representation
        for name, strength in (("least squares", 0.0), ("ridge", penalty)):
            predictions = np.zeros((*inputs.shape[:2], self.d))
            predictions[:, first:] = prefix_ridge(features, following, strength)
            found[name] = predictions
        return found
