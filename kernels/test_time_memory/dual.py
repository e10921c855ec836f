"""Memories over the exact exponential features, in dual form: keys and updates of all earlier tokens, no weights.

phi holds all monomials of every degree, scaled so that phi(q) . phi(k) = exp(scale (q . k - 1)): of length 1 for unit
vectors, and of infinite width, hence only its kernel can be computed. A matrix memory is then

    M_t = sum over s <= t of write[t, s] u_s phi(k_s)^T,   write[t, s] = sum over n of L[t, n] eta_n gamma_{n, n - s}

with L[t, n] the product of alpha over n < tau <= t. Its updates u are the values ("dot"), or the errors of the memory
before the token ("l2"), which a triangular system gives. Shapes: q, k [B, H, T, d], u [B, H, T, d_v], gates [B, H, T],
keys of S tokens in the order in which they came, `seen` [B or 1, 1, T, S] bool: what each token may see.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
