"""The socket of synthetic tasks: a task is a config that makes examples, each a pure function of (seed, split, index).

Shapes: B examples of T positions. Token tasks have ids [B, T]; vector tasks have vectors [B, T, D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.random import Generator, Philox

from llm.config.base import Tagged
from llm.core.batch import IGNORE
from llm.core.init import name_seed
from llm.core.registry import Registry

TASKS: Registry[TaskConfig] = Registry("task")
Split = Literal["train", "valid"]


@dataclass(frozen=True)
class Examples:
    """inputs [B, T] int64 or [B, T, D] float32; answers [B, T] int64 (IGNORE where nothing is asked) or [B, T, Do]
    float32; asked [B, T] bool; groups [B, T] int64: by what the result is broken down (-1: by nothing)."""

    inputs: np.ndarray
    answers: np.ndarray
    asked: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass
class Row:
    """One example, as a task makes it; `groups` is one number for all its answers, or one for each position."""

    inputs: np.ndarray
    answers: np.ndarray
    asked: np.ndarray
    groups: np.ndarray | int = -1


class TaskConfig(Tagged):
    """The settings of a task. A subclass makes one example from a random generator, and says what chance gives and
    what can be known (`oracle`), both from the inputs alone."""

    registry = TASKS
    group_name: ClassVar[str] = ""

    @property
    def n_positions(self) -> int:
        """T of every example."""
        raise NotImplementedError

    def example(self, rng: Generator) -> Row:
        """One example."""
        raise NotImplementedError

    def longer(self, n_positions: int) -> TaskConfig:
        """The same task in more positions, otherwise as hard; UserError where it does not fit."""
        raise NotImplementedError

    def row(self, seed: int, split: Split, index: int) -> Row:
        """Example `index` of a split."""
        key = np.array([name_seed(seed, f"{self.type_name}/{split}"), index], dtype=np.uint64)
        return self.example(Generator(Philox(key=key)))

    def examples(self, seed: int, split: Split, start: int, count: int) -> Examples:
        """Examples start .. start + count of a split."""
        rows = [self.row(seed, split, index) for index in range(start, start + count)]
        groups = [np.broadcast_to(np.asarray(row.groups, dtype=np.int64), row.asked.shape) for row in rows]
        return Examples(
            np.stack([row.inputs for row in rows]),
            np.stack([row.answers for row in rows]),
            np.stack([row.asked for row in rows]),
            np.stack(groups),
        )


class TokenTask(TaskConfig):
    """Token ids in, token ids out; measured in accuracy."""

    @property
    def n_ids(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    def chance(self) -> float:
        """Expected accuracy of an answer picked at random from those that the sequence holds."""
        raise NotImplementedError

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        """The right answers [T] by rule, from the tokens [T] of one example; any value where nothing is asked."""
        raise NotImplementedError


class VectorTask(TaskConfig):
    """Vectors in, vectors out; measured in squared error relative to the mean square of what is asked for."""

    @property
    def d_in(self) -> int:
        """Width of the inputs."""
        raise NotImplementedError

    @property
    def d_out(self) -> int:
        """Width of the answers."""
        raise NotImplementedError

    def oracles(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Predictions [B, T, Do] by classical methods, by name, from inputs [B, T, D]."""
        raise NotImplementedError


def token_row(tokens: np.ndarray, answers: dict[int, int], groups: np.ndarray | int = -1) -> Row:
    """A row of a token task from {position: answer}."""
    labels = np.full(len(tokens), IGNORE, dtype=np.int64)
    for position, answer in answers.items():
        labels[position] = answer
    return Row(tokens, labels, labels != IGNORE, groups)


def accuracy(predictions: np.ndarray, examples: Examples) -> dict[str, Any]:
    """predictions [B, T] -> accuracy over answers, exact: share of examples with all answers right, by_group."""
    right = (predictions == examples.answers) & examples.asked
    rows_right = (right | ~examples.asked).all(axis=1)
    return {
        "accuracy": float(right.sum() / examples.asked.sum()),
        "exact": float(rows_right.mean()),
        "by_group": _by_group(right.astype(np.float64), examples),
    }


def squared_error(predictions: np.ndarray, examples: Examples) -> dict[str, Any]:
    """predictions [B, T, Do] -> error: squared error over the mean square of the answers, also by_group."""
    asked = examples.asked
    scale = float(np.square(examples.answers[asked], dtype=np.float64).mean())
    squares = np.square(predictions - examples.answers, dtype=np.float64).mean(axis=-1) / max(scale, 1e-300)
    return {"error": float(squares[asked].mean()), "by_group": _by_group(squares, examples)}


def _by_group(values: np.ndarray, examples: Examples) -> dict[str, float]:
    groups = examples.groups[examples.asked]
    found = {int(group): float(values[examples.asked][groups == group].mean()) for group in np.unique(groups)}
    return {str(group): value for group, value in found.items() if group >= 0 and math.isfinite(value)}
