"""The look-up of a Memory Layer in Triton: a weighted gather-add, and a scatter-add by atomic additions."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from kernels.memory_layer.spec import MEMORY_LOOKUP, MemoryLookupQuery


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonMemoryLookup:
    """CUDA, fp32, fp16 and bf16 tables; sums in fp32."""

    name = "triton"
    kind = "triton"

    def priority(self, query: MemoryLookupQuery) -> int:
        return 70

    def supports(self, query: MemoryLookupQuery) -> Literal[True] | str:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if query.device != "cuda" and not (query.device == "cpu" and interpreting()):
            return f"it is made for CUDA, not {query.device}"
        if query.dtype == torch.float64:
            return "it takes fp32, fp16 and bf16, not fp64"
        if query.deterministic:
            return "its atomic additions come in any order, and deterministic algorithms were asked for"
        return True

    def forward(self, tables: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
        """y [N, D]."""
        n_tables, n_rows, width = tables.shape
        out = weights.new_empty(len(codes), width)
        if out.numel():
            from kernels.memory_layer.triton_kernels import lookup_forward

            block = _block(width)
            lookup_forward[len(codes), -(-width // block)](
                tables.contiguous(), codes.contiguous(), weights.contiguous(), out, n_tables, n_rows, width, BLOCK=block
            )
        return out

    def backward(self, grad: Tensor, tables: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of tables [K, R, D], gradient of weights [N, K])."""
        n_tables, n_rows, width = tables.shape
        d_tables = torch.zeros(tables.shape, dtype=weights.dtype, device=tables.device)
        d_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
        if d_weights.numel():
            from kernels.memory_layer.triton_kernels import lookup_backward

            lookup_backward[len(codes), n_tables](
                grad.contiguous(), tables.contiguous(), codes.contiguous(), weights.contiguous(), d_tables, d_weights,
                n_tables, n_rows, width, BLOCK=_block(width),
            )  # fmt: skip
        return d_tables.to(tables.dtype), d_weights


def _block(width: int) -> int:
    return min(1024, max(16, 1 << (width - 1).bit_length()))


TRITON = MEMORY_LOOKUP.add(TritonMemoryLookup())
