"""What the two regression tasks share: a fixed random representation, and least squares on growing prefixes."""

from __future__ import annotations

import functools

import numpy as np
from numpy.random import Generator, Philox

LEAK = 0.1


class Representation:
    """Phi: two layers with leaky ReLU, fixed weights of unit gain; x [..., d_in] -> [..., d_out].

    normalised: scaled to a root mean square of 1, so that a recursion through it stays bounded.
    """

    def __init__(self, d_in: int, d_out: int, seed: int, *, normalised: bool = False) -> None:
        rng = Generator(Philox(key=np.array([seed, 0], dtype=np.uint64)))
        gain = np.sqrt(2 / (1 + LEAK**2))
        self.first = rng.standard_normal((d_in, d_out)) * gain / np.sqrt(d_in)
        self.second = rng.standard_normal((d_out, d_out)) * gain / np.sqrt(d_out)
        self.normalised = normalised

    def __call__(self, x: np.ndarray) -> np.ndarray:
        hidden = _leaky(_leaky(x @ self.first) @ self.second)
        if self.normalised:
            hidden = hidden / np.sqrt(np.square(hidden).mean(axis=-1, keepdims=True) + 1e-12)
        return hidden


def _leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, LEAK * x)


@functools.cache
def representation(d_in: int, d_out: int, seed: int, *, normalised: bool = False) -> Representation:
    """The Representation of these settings, made once."""
    return Representation(d_in, d_out, seed, normalised=normalised)


def prefix_ridge(features: np.ndarray, answers: np.ndarray, penalty: float) -> np.ndarray:
    """Predictions [B, N, Do] of answer i from pairs 0 .. i - 1 alone: features [B, N, F], answers [B, N, Do].

    Ridge regression with `penalty` on the squared weights; 0 gives least squares, of least norm while i < F.
    """
    predictions = np.zeros(answers.shape, dtype=np.float64)
    x, y = features.astype(np.float64), answers.astype(np.float64)
    eye = np.eye(x.shape[-1])
    for i in range(1, x.shape[1]):
        seen = x[:, :i]
        if penalty > 0:
            transposed = seen.transpose(0, 2, 1)
            weights = np.linalg.solve(transposed @ seen + penalty * eye, transposed @ y[:, :i])
        else:
            weights = np.linalg.pinv(seen, rcond=1e-9) @ y[:, :i]
        predictions[:, i] = (x[:, i, None] @ weights)[:, 0]
    return predictions
