"""Random numbers of an output, and a draw from probabilities with a given one."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """[B] ids by inverse distribution function: probs [B, V] up to a factor, uniform [B] in [0, 1). Never an id of
    probability 0."""
    cdf = probs.double().cumsum(dim=-1)
    target = uniform.to(cdf)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True).squeeze(1)
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(ids, last)


class Stream:
    """Random numbers in [0, 1) of one output, which can be looked at before they are used. seed None: a new one."""

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(seed)
        self._ahead: list[float] = []

    def peek(self, n: int) -> list[float]:
        """The next n numbers, which stay the next ones."""
        while len(self._ahead) < n:
            self._ahead.append(self._random.random())
        return self._ahead[:n]

    def take(self, n: int) -> list[float]:
        """The next n numbers."""
        taken = self.peek(n)
        del self._ahead[:n]
        return taken
