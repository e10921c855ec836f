"""Which drafted tokens are kept, so that the output has exactly the model's own law (Leviathan et al. 2023).

Shapes: drafts [B, N] tokens, of row b the first counts[b]; p [B, N + 1, V] the model's probabilities at the place of
each draft and behind the last; q [B, N, V] those that each draft was drawn from, None: it was certain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm.generate.draw import draw


def _leading(ok: Tensor, counts: Tensor) -> Tensor:
    """[B] how many of the first counts[b] entries of ok [B, N] are true before the first false one."""
    inside = torch.arange(ok.shape[1], device=ok.device) < counts[:, None]
    return (ok & inside).long().cumprod(dim=1).sum(dim=1)


def accept_greedy(targets: Tensor, drafts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(accepted [B], the token behind them [B]): targets [B, N + 1] are the model's likeliest tokens."""
    accepted = _leading(targets[:, :-1] == drafts, counts)
    return accepted, targets.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    p: Tensor, q: Tensor | None, drafts: Tensor, counts: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """(accepted [B], the token behind them [B]). uniform [B, N + 1] in [0, 1): one per draft, the last for the draw.

    A draft d is kept with probability min(1, p(d) / q(d)); in place of the first that is not, a token is drawn from the
    normalised max(p - q, 0), and behind N kept ones from p.
    """
    rows = torch.arange(len(p), device=p.device)
    chance = p[:, :-1].gather(2, drafts[..., None])[..., 0]
    drawn = torch.ones_like(chance) if q is None else q.gather(2, drafts[..., None])[..., 0]
    accepted = _leading(uniform[:, :-1] * drawn < chance, counts)
    own = p[rows, accepted]
    if not drafts.shape[1]:
        return accepted, draw(own, uniform[:, -1])
    at = accepted.clamp(max=drafts.shape[1] - 1)
    refused = drafts[rows, at]
    proposed = torch.zeros_like(own).scatter(1, refused[:, None], own.gather(1, refused[:, None]))
    left = (own - (proposed if q is None else q[rows, at])).clamp(min=0)
    # Rounding may leave nothing where p and q are equal; a refusal has probability zero there.
    replace = (accepted < counts) & (left.sum(dim=1) > 0)
    return accepted, draw(torch.where(replace[:, None], left, own), uniform[:, -1])
