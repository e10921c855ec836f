"""Which drafted tokens are kept, so that the output has exactly the model's own law (Leviathan et al. 2023).

Shapes: drafts [B, N] tokens, of row b the first counts[b]; p [B, N + 1, V] the model's probabilities at the place of
each draft and behind the last; q [B, N, V] those that each draft was drawn from. A draft that nobody drew needs no q:
what the model itself takes at each place is compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm.generate.draw import draw


def _leading(ok: Tensor, counts: Tensor) -> Tensor:
    """[B] how many of the first counts[b] entries of ok [B, N] are true before the first false one."""
    inside = torch.arange(ok.shape[1], device=ok.device) < counts[:, None]
    return (ok & inside).long().cumprod(dim=1).sum(dim=1)


def accept_chosen(targets: Tensor, drafts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(accepted [B], the token behind them [B]): targets [B, N + 1] are what the model itself takes at each place, its
    likeliest token or a draw from p."""
    accepted = _leading(targets[:, :-1] == drafts, counts)
    return accepted, targets.gather(1, accepted[:, None])[:, 0]


def accept_sampled(p: Tensor, q: Tensor, drafts: Tensor, counts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(accepted [B], the token behind them [B]). uniform [B, N + 1] in [0, 1): one per draft, the last for the draw.

    A draft d is kept with probability min(1, p(d) / q(d)); in place of the first that is not, a token is drawn from the
    normalised max(p - q, 0), and behind N kept ones from p.
    """
    rows = torch.arange(len(p), device=p.device)
    chance = p[:, :-1].gather(2, drafts[..., None])[..., 0]
    drawn = q.gather(2, drafts[..., None])[..., 0]
    accepted = _leading(uniform[:, :-1] * drawn < chance, counts)
    own = p[rows, accepted]
    if not drafts.shape[1]:
        return accepted, draw(own, uniform[:, -1])
    at = accepted.clamp(max=drafts.shape[1] - 1)
    left = (own - q[rows, at]).clamp(min=0)
    # Rounding may leave nothing where p and q are equal; a refusal has probability zero there.
    replace = (accepted < counts) & (left.sum(dim=1) > 0)
    return accepted, draw(torch.where(replace[:, None], left, own), uniform[:, -1])


def best_branches(accepted: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """[B] of the branches of each row the one of which most is kept, the first of several. accepted, rows [R]: tokens
    kept of each branch, and whose it is."""
    places = torch.arange(len(rows), device=rows.device)
    own = rows == torch.arange(n_rows, device=rows.device)[:, None]
    return torch.where(own, accepted * len(rows) + len(rows) - places, 0).argmax(dim=1)


def behind(drafts: Tensor, accepted: Tensor, ids: Tensor) -> Tensor:
    """[B, N + 1]: the first accepted[b] of drafts [B, N], then ids [B]; what comes after that means nothing."""
    return torch.cat([drafts, ids[:, None]], dim=1).scatter(1, accepted[:, None], ids[:, None])
