"""Keys and values in pages: a block table [B, N] says in which page each run of P tokens of a row stands.

Attention over pages is here that over the gathered keys. An implementation that reads pages where they are takes the
same arguments: pages [n_pages, P, Hkv, D] and the table.
"""

from __future__ import annotations

from torch import Tensor


def gather_pages(pages: Tensor, table: Tensor, n: int) -> Tensor:
    """The first n <= N * P tokens of each row: pages [n_pages, P, ...], table [B, N] int64 -> [B, n, ...]."""
    return pages[table].flatten(1, 2)[:, :n]


def scatter_tokens(pages: Tensor, table: Tensor, slots: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """Write x [B, T, ...] at places slots [B, T] of the rows; keep [B, T] bool: only these. In place."""
    size = pages.shape[1]
    places = table.gather(1, (slots // size).clamp(max=table.shape[1] - 1)) * size + slots % size
    if keep is not None:
        places, x = places[keep], x[keep]
    pages.view(-1, *pages.shape[2:])[places] = x.to(pages.dtype)
