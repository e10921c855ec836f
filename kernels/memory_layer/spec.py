"""The look-up of a Memory Layer: the operation and how an implementation is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import OpSpec, Tolerance, register_op


@dataclass(frozen=True)
class MemoryLookupQuery:
    """Tables of `dtype` on `device`; weights are fp32, or fp64 beside tables in fp64. deterministic: equal inputs must
    give equal bits.

    An implementation has forward(tables, codes, weights) -> y [N, D] and backward(grad, tables, codes, weights) ->
    gradients of tables and weights, for tables [K, R, D], codes [N, K], weights [N, K], grad [N, D].
    """

    device: str
    dtype: torch.dtype
    deterministic: bool = False


def lookup_case(dtype: torch.dtype, device: torch.device, sizes: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """(tables, codes, weights, gradient of the output) for sizes (N, K, R, D); one row is addressed by many tokens."""
    n, k, r, d = sizes
    rng = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    codes = torch.randint(0, r, (n, k), generator=rng)
    codes[: n // 2, 0] = 1
    values = (torch.randn(shape, generator=rng) for shape in ((k, r, d), (n, k), (n, d)))
    tables, weights, grad = values
    return tables.to(device, dtype), codes.to(device), weights.to(device, wide), grad.to(device, wide)


def check_memory_lookup(impl: Any, query: MemoryLookupQuery, device: torch.device) -> str | None:
    """Compare outputs and gradients with the reference in fp64, for sizes that no block size divides."""
    from kernels.memory_layer.reference import REFERENCE

    tolerance = MEMORY_LOOKUP.tolerances[query.dtype]
    for sizes in ((37, 3, 8, 69), (1, 5, 2, 1), (9, 1, 4, 200)):
        tables, codes, weights, grad = lookup_case(query.dtype, device, sizes)
        found = (impl.forward(tables, codes, weights), *impl.backward(grad, tables, codes, weights))
        wide = (tables.double(), codes, weights.double())
        wanted = (REFERENCE.forward(*wide), *REFERENCE.backward(grad.double(), *wide))
        for name, a, b in zip(("output", "gradient of tables", "gradient of weights"), found, wanted):
            fault = tolerance.fault(name, a, b)
            if fault is not None:
                return fault
    return None


MEMORY_LOOKUP = register_op(
    OpSpec(
        "memory_layer",
        tolerances={
            torch.float64: Tolerance(1e-12, 1e-12),
            torch.float32: Tolerance(1e-5, 1e-5),
            torch.float16: Tolerance(2e-3, 2e-3),
            torch.bfloat16: Tolerance(1e-2, 1e-2),
        },
        check=check_memory_lookup,
    )
)
