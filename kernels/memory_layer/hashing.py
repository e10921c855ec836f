"""Addresses and weights of a Memory Layer: which row a piece of the input takes, and how strongly."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weighting = Literal["l1_prob", "prob"]


def hash_codes(z: Tensor) -> Tensor:
    """[..., K] int64: the signs of each piece z [..., K, n_bits] as a number, first element most significant; zero
    counts as positive."""
    n_bits = z.shape[-1]
    places = 2 ** torch.arange(n_bits - 1, -1, -1, device=z.device)
    return ((z >= 0) * places).sum(-1)


def hash_weights(z: Tensor, weighting: Weighting, temperature: float = 1.0) -> Tensor:
    """[..., K] in the dtype of z: the weight of the addressed row, which carries the gradient of z [..., K, n_bits].

    prob: the softmax over all 2^n_bits sign vectors s of <z, s> / temperature at the addressed one, which is
    prod_j sigmoid(2 |z_j| / temperature). l1_prob: that, at temperature 1, times sum_j |z_j|.
    """
    size = z.abs()
    # The product in log space: in half precision the factors' own product would underflow.
    p = torch.exp(-F.softplus(size * (-2.0 / temperature)).sum(-1))
    return p * size.sum(-1) if weighting == "l1_prob" else p
