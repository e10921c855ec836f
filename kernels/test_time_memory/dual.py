"""Memories over the exact exponential features, in dual form: keys and updates of all earlier tokens, no weights.

phi holds all monomials of every degree, scaled so that phi(q) . phi(k) = exp(scale (q . k - 1)): of length 1 for unit
vectors, and of infinite width, hence only its kernel can be computed. A matrix memory is then

    M_t = sum over s <= t of write[t, s] u_s phi(k_s)^T,   write[t, s] = sum over n of L[t, n] eta_n gamma_{n, n - s}

with L[t, n] the product of alpha over n < tau <= t. Its updates u are the values ("dot"), or the errors of the memory
before the token ("l2"), which a triangular system gives. With a window of c, "l2" writes c updates at each token, with
its own key and with those before it: S * c of them, c a token (`windows`, `each_update`).

Shapes: q, k [B, H, T, d], u [B, H, T, d_v], gates [B, H, T], keys of S tokens in the order in which they came, `seen`
[B or 1, 1, T, S] bool: what each token may see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.test_time_memory.network import gelu, gelu_slope, times


def exponential_kernel(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """[B, H, T, S] of q [B, H, T, d], k [B, H, S, d] and scale [H]."""
    return ((q @ k.mT - 1) * scale[:, None, None]).exp()


def kept(log_alpha: Tensor | None, seen: Tensor, like: Tensor) -> Tensor:
    """What is left at each token of what was written at each seen one, log_alpha [B, H, S] -> [B, H, T, S]; zero where
    unseen. With a `seen` that leaves out the token itself, what is left just before it forgets.

    Sums instead of differences of sums, so that neither long contexts nor a gate of zero cost precision.
    """
    if log_alpha is None:
        return seen.to(like.dtype)
    summed = torch.where(seen, log_alpha[..., None, :], 0.0).flip(-1).cumsum(-1).flip(-1)
    return torch.where(seen, F.pad(summed[..., 1:], (0, 1)), -torch.inf).exp()


def kept_from_start(log_alpha: Tensor | None, seen: Tensor, like: Tensor) -> Tensor:
    """What is left at each token of the memory before the document, [B, H, T, 1]."""
    if log_alpha is None:
        return torch.ones_like(like[..., :1])
    return torch.where(seen, log_alpha[..., None, :], 0.0).sum(-1, keepdim=True).exp()


def windows(x: Tensor, n: int) -> Tensor:
    """x [B, H, S, d] -> [B, H, S * n, d]: of each token the vectors of the last n tokens, its own first; zero
    in front of the first token."""
    if n == 1:
        return x
    shifted = [F.pad(x[..., : max(0, x.shape[2] - j), :], (0, 0, min(j, x.shape[2]), 0)) for j in range(n)]
    return torch.stack(shifted, dim=3).flatten(2, 3)


def each_update(left: Tensor, n: int) -> Tensor:
    """left [..., T, S] -> [..., T, S * n], for each of the n updates of a token."""
    return left if n == 1 else left.repeat_interleave(n, dim=-1)


def written(left: Tensor, rates: Tensor, seen: Tensor) -> Tensor:
    """write of the module's text. left: as from `kept`; rates [B, H, S, c]: eta_n gamma_{n, j}."""
    total = left * rates[..., None, :, 0]
    for j in range(1, min(rates.shape[-1], left.shape[-1])):
        total = total + F.pad((left * rates[..., None, :, j])[..., j:], (0, j))
    return torch.where(seen, total, 0.0)


def delta_updates(
    k: Tensor, target: Tensor, eta: Tensor, left: Tensor, scale: Tensor, past: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """eta_t (target_t - M_{t-1} phi(k_t)), [B, H, T, d_v]: U = (I + diag(eta) (left * kernel))^-1 diag(eta) (V - past).

    left [B, H, T, P + T]: `kept` just before each token, for P tokens of the past (their keys [B, H, P, d] and updates
    [B, H, P, d_v]) and the T themselves.
    """
    system = eta[..., None] * left[..., left.shape[-1] - k.shape[2] :] * exponential_kernel(k, k, scale)
    if past is not None:
        old_k, old_u = past
        target = target - (left[..., : old_k.shape[2]] * exponential_kernel(k, old_k, scale)) @ old_u
    return torch.linalg.solve_triangular(system, eta[..., None] * target, upper=False, unitriangular=True)


class DeepMemory(NamedTuple):
    """W_1 gelu(W_2 phi(z)) in dual form, as it is at some tokens: of its start (w1 [H, d_v, hidden], w2 [H, hidden, d])
    `start` [B, H, T, 1] is left, and of M updates `write` [B, H, T or 1, M]: keys [B, H, M, d], first (of W_2) and
    hidden [B, H, M, hidden], updates (of W_1) [B, H, M, d_v]. w2 acts on z itself, what it has learned on phi(z)."""

    w1: Tensor
    w2: Tensor
    start: Tensor
    write: Tensor
    scale: Tensor
    keys: Tensor
    updates: Tensor
    hidden: Tensor
    first: Tensor

    def ask(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(W_2 phi(z), its gelu, what the memory answers) for z [B, H, T, d]."""
        before = self.start * times(z, self.w2)
        before = before + (exponential_kernel(z, self.keys, self.scale) * self.write) @ self.first
        active = gelu(before)
        return (
            before,
            active,
            self.start * times(active, self.w1) + ((active @ self.hidden.mT) * self.write) @ self.updates,
        )

    def errors(self, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gelu(W_2 phi(z)), error of the answer to z, error of W_2 phi(z)) for 1/2 |answer - target|^2."""
        before, active, answer = self.ask(z)
        error = answer - target
        back = self.start * times(error, self.w1.mT) + ((error @ self.updates.mT) * self.write) @ self.hidden
        return active, error, back * gelu_slope(before)
