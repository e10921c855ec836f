"""Banded attention by blocks of `window` queries, each against its own block of keys and the one before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = -1e30
"""Score of what a query does not see. Finite, so that a query that sees nothing has finite outputs and gradients."""


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    segments: Tensor | None = None,
    *,
    scale: float = 1.0,
    self_score: float | None = None,
    slopes: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [B, N, H, V] in the dtype of v, log-sum-exp of the visible scores [B, N, H], at least fp32)."""
    n = q.shape[1]
    size = min(window, n)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (_blocks(x, size) for x in (q, k, v))
        n_blocks = q.shape[1]
        ids = torch.zeros(1, n, dtype=torch.int64, device=q.device) if segments is None else segments
        ids, key_ids = _by_block(ids, size, padding=-1, first=-2)
        if n_blocks > 1:
            k, v = _with_previous(k), _with_previous(v)
        index = torch.arange(size, device=q.device)
        back = index[:, None] + (k.shape[2] - size) - torch.arange(k.shape[2], device=q.device)
        seen = (back >= 0) & (back < window) & (ids[..., :, None] == key_ids[..., None, :])
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2)).to(wide) * scale
        if slopes is not None and positions is not None:
            place, key_place = _by_block(positions, size)
            distance = (place[..., :, None] - key_place[..., None, :])[:, :, None]
            scores = scores - slopes.to(wide)[:, None, :, None, None] * distance
        if self_score is not None:
            scores = torch.where(back == 0, self_score, scores)
        scores = scores.masked_fill(~seen[:, :, None], HIDDEN)
        lse = scores.logsumexp(-1)
        o = (scores - lse[..., None]).exp().to(v.dtype) @ v.transpose(2, 3)
    return _flat(o, n), _flat(lse[..., None], n)[..., 0]


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys of several disjoint sets, from (o [..., V], lse [...]) over each of them."""
    lses = torch.stack([lse for _, lse in parts])
    weights = lses.softmax(0)  # exp(lses - logsumexp) would not add up to one where the scores are large
    o = sum(w[..., None] * part.to(w.dtype) for w, (part, _) in zip(weights, parts))
    assert isinstance(o, Tensor)
    return o.to(parts[0][0].dtype), lses.logsumexp(0)


def _blocks(x: Tensor, size: int) -> Tensor:
    """[B, N, H, D] -> [B, blocks, size, H, D], padded with zeros on the right."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _by_block(x: Tensor, size: int, *, padding: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
    """x [B, N] of the queries [B, blocks, size] and of the keys that each block meets, with `padding` after the end and
    `first` before the start."""
    x = F.pad(x, (0, -x.shape[1] % size), value=padding).unflatten(1, (-1, size))
    if x.shape[1] == 1:
        return x, x
    return x, torch.cat([F.pad(x, (0, 0, 1, 0), value=first)[:, :-1], x], dim=2)


def _with_previous(x: Tensor) -> Tensor:
    """[B, blocks, size, ...] -> [B, blocks, 2 * size, ...]: the block before, then the block."""
    return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=2)


def _flat(x: Tensor, n: int) -> Tensor:
    """[B, blocks, H, size, V] -> [B, N, H, V]."""
    return x.transpose(2, 3).flatten(1, 2)[:, :n]
