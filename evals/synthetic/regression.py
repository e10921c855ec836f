"""In-context linear regression, also behind a fixed representation."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import Generator
from pydantic import Field

from evals.synthetic.base import TASKS, Row, TaskConfig, VectorTask
from evals.synthetic.representation import prefix_ridge, representation
from llm.core.errors import UserError
from llm.core.registry import About


@TASKS.register(
    "regression",
    tiny=lambda: Regression(d=3, n_points=8),
    paper="Garg et al. 2022, arXiv:2208.01066",
    about=About(
        equation="x₁ y₁ … x_n y_n with y = w·Φ(x) + noise, w new in each sequence: at x_i answer y_i",
        use="Whether a mixer learns in its context, measured against least squares and ridge on the same pairs.",
        weakness="Far from language; small models need many steps before they leave the mean.",
    ),
)
class Regression(VectorTask):
    """d: width of x ~ N(0, I). n_points: pairs of a sequence, each two positions, y in the first coordinate of its own.
    noise: standard deviation on y. d_representation: width of a fixed random two-layer Phi (None: Phi(x) = x); the
    weights are N(0, I / width), so y has about unit variance. representation_seed: which Phi."""

    group_name: ClassVar[str] = "pairs seen"
    d: int = Field(20, ge=1)
    n_points: int = Field(40, ge=2)
    noise: float = Field(0.0, ge=0)
    d_representation: int | None = Field(None, ge=1)
    representation_seed: int = Field(0, ge=0)

    @property
    def d_in(self) -> int:
        return self.d

    @property
    def d_out(self) -> int:
        return 1

    @property
    def n_positions(self) -> int:
        return 2 * self.n_points

    def features(self, x: np.ndarray) -> np.ndarray:
        """Phi(x), [..., d] -> [..., width]."""
        if self.d_representation is None:
            return x
        return representation(self.d, self.d_representation, self.representation_seed)(x)

    def example(self, rng: Generator) -> Row:
        x = rng.standard_normal((self.n_points, self.d))
        features = self.features(x)
        width = features.shape[-1]
        weights = rng.standard_normal(width) / np.sqrt(width)
        y = features @ weights + self.noise * rng.standard_normal(self.n_points)
        inputs = np.zeros((self.n_positions, self.d), dtype=np.float32)
        inputs[0::2], inputs[1::2, 0] = x, y
        answers = np.zeros((self.n_positions, 1), dtype=np.float32)
        answers[0::2, 0] = y
        asked = np.arange(self.n_positions) % 2 == 0
        return Row(inputs, answers, asked, np.arange(self.n_positions) // 2)

    def longer(self, n_positions: int) -> TaskConfig:
        if n_positions % 2:
            raise UserError(f"regression: {n_positions} positions are no whole number of pairs; give an even number")
        return self.replace(n_points=n_positions // 2)

    def oracles(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Least squares and ridge (the best possible, for Gaussian weights) on Phi(x); least squares on x itself."""
        x, y = inputs[:, 0::2], inputs[:, 1::2, :1]
        features = self.features(x.astype(np.float64))
        penalty = self.noise**2 * features.shape[-1]
        found = {"least squares": prefix_ridge(features, y, 0.0), "ridge": prefix_ridge(features, y, penalty)}
        if self.d_representation is not None:
            found["least squares on raw x"] = prefix_ridge(x, y, 0.0)
        return {name: np.repeat(predictions, 2, axis=1) for name, predictions in found.items()}
