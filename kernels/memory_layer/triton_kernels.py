"""Triton source of the look-up; imported only where it runs. Row addresses are 64-bit: K * R * D goes beyond 2^31."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def lookup_forward(tables: Any, codes: Any, weights: Any, out: Any, n_tables, n_rows, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    for k in range(n_tables):
        code = tl.load(codes + token * n_tables + k)
        weight = tl.load(weights + token * n_tables + k)
        row = tl.load(tables + (code + k * n_rows) * width + columns, mask=inside, other=0.0)
        total += weight * row.to(total.dtype)
    tl.store(out + token * width + columns, total, mask=inside)


@triton.jit
def lookup_backward(  # type: ignore[no-untyped-def]
    grad: Any, tables: Any, codes: Any, weights: Any, d_tables: Any, d_weights: Any, n_tables, n_rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token and table."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    code = tl.load(codes + token * n_tables + k)
    weight = tl.load(weights + token * n_tables + k)
    base = (code + k * n_rows) * width
    dot = tl.zeros([BLOCK], dtype=d_weights.dtype.element_ty)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        g = tl.load(grad + token * width + columns, mask=inside, other=0.0)
        row = tl.load(tables + base + columns, mask=inside, other=0.0)
        dot += g * row.to(dot.dtype)
        tl.atomic_add(d_tables + base + columns, weight * g, mask=inside)
    tl.store(d_weights + token * n_tables + k, tl.sum(dot))
