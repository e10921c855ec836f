"""The look-up of a Memory Layer written out; its gradients are autograd's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.memory_layer.spec import MEMORY_LOOKUP, MemoryLookupQuery


class ReferenceMemoryLookup:
    """Holds a row per token and table: N * K * D numbers."""

    name = "reference"
    kind = "reference"

    def priority(self, query: MemoryLookupQuery) -> int:
        return 0

    def supports(self, query: MemoryLookupQuery) -> Literal[True] | str:
        return True

    def forward(self, tables: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
        """y [N, D]."""
        rows = tables[torch.arange(tables.shape[0], device=codes.device), codes]
        return (weights[..., None] * rows.to(weights.dtype)).sum(1)

    def backward(self, grad: Tensor, tables: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of tables [K, R, D], gradient of weights [N, K])."""
        with torch.enable_grad():
            inputs = [tables.detach().requires_grad_(), weights.detach().requires_grad_()]
            d_tables, d_weights = torch.autograd.grad(self.forward(inputs[0], codes, inputs[1]), inputs, grad)
        return d_tables, d_weights


REFERENCE = MEMORY_LOOKUP.add(ReferenceMemoryLookup())
