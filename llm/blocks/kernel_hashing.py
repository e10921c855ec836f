"""Kernel hashing: binary codes from radial basis features, and hash functions fitted to similarities (KSH; Liu et al.
2012), as EcoFormer uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def squared_distances(u: Tensor, anchors: Tensor) -> Tensor:
    """[..., H, M] of u [..., H, d] to anchors [H, M, d]."""
    cross = torch.einsum("...hd,hmd->...hm", u, anchors)
    return u.square().sum(-1, keepdim=True) + anchors.square().sum(-1) - 2 * cross


def rbf_features(distances: Tensor, sigma: Tensor) -> Tensor:
    """exp(-distance / (2 sigma)) [..., H, M] with the bandwidths sigma [H]."""
    return torch.exp(-distances / (2 * sigma[:, None]))


def sign_codes(z: Tensor) -> Tensor:
    """+1 where z >= 0, else -1, exactly; its gradient is that of z clipped to [-1, 1] (straight-through)."""
    soft = z.clamp(-1.0, 1.0)
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype) + (soft - soft.detach())


def similarity_targets(u: Tensor, n_pairs: int) -> Tensor:
    """[B, H, N, N] of normalised u [B, N, H, d]: +1 for the n_pairs most similar tokens of each row, -1 for the least
    similar ones, 0 between."""
    similar = torch.einsum("bnhd,bmhd->bhnm", u, u)
    n_pairs = min(n_pairs, u.shape[1] // 2)
    order = similar.argsort(-1)
    targets = torch.zeros_like(similar)
    targets.scatter_(-1, order[..., :n_pairs], -1.0)
    return targets.scatter_(-1, order[..., similar.shape[-1] - n_pairs :], 1.0)


@dataclass(frozen=True)
class HashFit:
    """functions [H, b, M]; first, kept [b, H]: loss of each bit's codes as it started and as it was kept."""

    functions: Tensor
    first: Tensor
    kept: Tensor


def fit_hash_functions(
    features: Tensor,
    targets: Tensor,
    n_bits: int,
    *,
    lr: float = 5e-4,
    momentum: float = 0.9,
    iterations: int = 100,
    generator: torch.Generator | None = None,
) -> HashFit:
    """Greedy kernel supervised hashing: codes sign(A kappa) whose products, over the bits, come near n_bits * targets.

    features (centred) [B, N, H, M], targets [B, H, N, N]. Each bit minimises -yᵀ S y with y = tanh(kappa a / 2) and is
    kept, head by head, only where that helps with y = sign(kappa a); then S loses y yᵀ.
    """
    features = features.detach()
    n_tokens, n_heads, n_features = features.shape[1:]
    left = n_bits * targets
    scale = 1.0 / (n_tokens * n_bits)

    def losses(y: Tensor) -> Tensor:
        """[H]"""
        return -scale * torch.einsum("bnh,bhnm,bmh->bh", y, left, y).mean(0)

    def project(a: Tensor) -> Tensor:
        return torch.einsum("bnhm,hm->bnh", features, a)

    functions, first, kept = [], [], []
    for _ in range(n_bits):
        start = torch.randn(n_heads, n_features, generator=generator, dtype=torch.float32).to(features)
        a = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([a], lr=lr, momentum=momentum, nesterov=True)
        with torch.enable_grad():
            for _ in range(iterations):
                optimizer.zero_grad()
                losses(torch.tanh(project(a) / 2)).mean().backward()
                optimizer.step()
        a = a.detach()
        before, after = (losses(sign_codes(project(each))) for each in (start, a))
        chosen = torch.where((after < before)[:, None], a, start)
        code = sign_codes(project(chosen))
        left = left - torch.einsum("bnh,bmh->bhnm", code, code)
        functions.append(chosen)
        first.append(before)
        kept.append(torch.minimum(before, after))
    return HashFit(torch.stack(functions, dim=1), torch.stack(first), torch.stack(kept))


def unit_vectors(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random directions: vectors of length 1 along the last dimension."""
    x = torch.empty(shape, device="cpu", dtype=torch.float32).normal_(generator=generator)
    return x / x.norm(dim=-1, keepdim=True)
