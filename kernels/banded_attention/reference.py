"""Banded attention with every score held."""

from __future__ import annotations

import torch
from torch import Tensor


def banded_attention_reference(
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
    """(o [B, N, H, V], log-sum-exp of the visible scores [B, N, H])."""
    n = q.shape[1]
    index = torch.arange(n, device=q.device)
    back = index[:, None] - index
    seen = ((back >= 0) & (back < window)).expand(q.shape[0], n, n)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if slopes is not None and positions is not None:
        scores = scores - slopes[..., None, None] * (positions[:, :, None] - positions[:, None])[:, None]
    if self_score is not None:
        scores = torch.where(back == 0, self_score, scores)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    o = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), v)
    return o, scores.logsumexp(-1).transpose(1, 2)
