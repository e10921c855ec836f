"""The look-up of a Memory Layer by torch's own operators, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.memory_layer.spec import MEMORY_LOOKUP, MemoryLookupQuery

CHUNK = 1 << 24
"""Numbers in the rows that are held at a time: 64 MiB of fp32."""


class GatherMemoryLookup:
    """Forward without holding rows where tables and weights have one dtype (a weighted embedding bag)."""

    name = "gather"
    kind = "torch"

    def priority(self, query: MemoryLookupQuery) -> int:
        return 50

    def supports(self, query: MemoryLookupQuery) -> Literal[True] | str:
        return True

    def forward(self, tables: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
        """y [N, D]."""
        flat, index = _flat(tables, codes)
        if tables.dtype == weights.dtype and len(codes):
            return F.embedding_bag(index, flat, mode="sum", per_sample_weights=weights.contiguous())
        out = weights.new_zeros(len(codes), tables.shape[-1])
        for part in _chunks(codes, tables.shape[-1]):
            rows = flat[index[part]].to(weights.dtype)
            torch.bmm(weights[part, None], rows, out=out[part, None])
        return out

    def backward(self, grad: Tensor, tables: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of tables [K, R, D], gradient of weights [N, K]). Sums of many tokens are made in the weights'
        dtype, whatever that of the tables."""
        flat, index = _flat(tables, codes)
        d_flat = torch.zeros(flat.shape, dtype=weights.dtype, device=flat.device)
        d_weights = torch.empty_like(weights)
        for part in _chunks(codes, tables.shape[-1]):
            rows = flat[index[part]].to(weights.dtype)
            d_weights[part] = torch.bmm(rows, grad[part, :, None])[..., 0]
            torch.mul(weights[part, :, None], grad[part, None], out=rows)
            d_flat.index_add_(0, index[part].flatten(), rows.flatten(0, 1))
        return d_flat.view(tables.shape).to(tables.dtype), d_weights


def _flat(tables: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """(all rows [K * R, D], which of them each token takes [N, K])."""
    n_tables, n_rows, _ = tables.shape
    return tables.flatten(0, 1), codes + torch.arange(n_tables, device=codes.device) * n_rows


def _chunks(codes: Tensor, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // (codes.shape[1] * width))
    return (slice(start, start + step) for start in range(0, len(codes), step))


GATHER = MEMORY_LOOKUP.add(GatherMemoryLookup())
