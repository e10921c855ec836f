"""Feature maps that lift keys and queries: all monomials up to a degree, or random sketches of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

FeatureMap = Literal["id", "poly2", "poly3", "sketch2", "sketch4"]

DEGREE: dict[FeatureMap, int] = {"id": 1, "poly2": 2, "poly3": 3, "sketch2": 2, "sketch4": 4}


def n_features(kind: FeatureMap, width: int, sketch: int = 0) -> int:
    """Width of the lifted vectors, for vectors of `width` (sketches have `sketch` features besides 1 and x)."""
    if kind == "id":
        return width
    if kind.startswith("sketch"):
        return 1 + width + sketch
    return math.comb(width + DEGREE[kind], DEGREE[kind])


def n_monomials(width: int, degree: int) -> int:
    """Monomials of exactly this degree."""
    return math.comb(width + degree - 1, degree)


def monomials(width: int, degree: int) -> Tensor:
    """[N, degree] int64: the indices whose product is each monomial of exactly this degree, in order."""
    return torch.combinations(torch.arange(width), degree, with_replacement=True)


def n_orders(width: int, degree: int) -> Tensor:
    """[N] int64: in how many orders the indices of each monomial can stand, degree! / prod beta!."""
    indices = monomials(width, degree)
    orders = torch.full((len(indices),), math.factorial(degree), dtype=torch.int64)
    run = torch.ones_like(orders)
    for place in range(1, degree):
        run = torch.where(indices[:, place] == indices[:, place - 1], run + 1, 1)
        orders = orders // run
    return orders


@dataclass(frozen=True)
class Features:
    """The tensors of a feature map; x [B, H, ..., T, d] -> phi(x) [B, H, ..., T, D].

    projection [H, r, d] or None: taken first. scale [H, n]: per degree, with phi(q) . phi(k) = sum over degrees i of
    scale_i^2 (q . k)^i / i! (for a sketch: degrees 0, 1 and the sketched one, the last approximately).
    tables: per degree from 2 on (indices [N, i], orders [N]). sketches: per doubling [2, n, r] Gaussian.
    normal: every phi(x) has unit norm.
    """

    kind: FeatureMap
    projection: Tensor | None = None
    scale: Tensor | None = None
    tables: tuple[tuple[Tensor, Tensor], ...] = ()
    sketches: tuple[Tensor, ...] = ()
    normal: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "id":
            return x
        if self.projection is not None:
            x = torch.einsum("bh...d,hrd->bh...r", x, self.projection)
            x = F.normalize(x, dim=-1, eps=1e-6)
        parts = [torch.ones_like(x[..., :1]), x]
        for indices, orders in self.tables:
            product = x.index_select(-1, indices[:, 0])
            for place in range(1, indices.shape[1]):
                product = product * x.index_select(-1, indices[:, place])
            parts.append(product * (orders.to(x.dtype) / math.factorial(indices.shape[1])).sqrt())
        if self.sketches:
            y = x
            for first, second in (sketch.to(x.dtype).unbind() for sketch in self.sketches):
                y = (y @ first) * (y @ second) * first.shape[1] ** -0.5
            parts.append(y * math.factorial(DEGREE[self.kind]) ** -0.5)
        assert self.scale is not None and self.scale.shape[1] == len(parts)
        scale = self.scale.reshape(self.scale.shape[0], *(1,) * (x.dim() - 3), -1)
        lifted = torch.cat([part * scale[..., i : i + 1] for i, part in enumerate(parts)], dim=-1)
        return F.normalize(lifted, dim=-1, eps=1e-6) if self.normal else lifted
