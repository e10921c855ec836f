"""A draw from probabilities with a given random number."""

from __future__ import annotations

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
