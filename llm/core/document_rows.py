"""Packed documents laid out as rows, for mixers that treat each document from its start."""

from __future__ import annotations

import torch
from torch import Tensor

from llm.core.seq import SeqInfo


class DocumentRows:
    """One row per document of a packed batch, as long as the longest one may be, padded on the right, where a causal
    mixer does not look at it. The same graph serves all packings of one shape."""

    def __init__(self, seq: SeqInfo, length: int) -> None:
        """length: of the batch's rows."""
        assert seq.cu_seqlens is not None, "documents are packed"
        starts = seq.cu_seqlens.long()
        device = starts.device
        self.n_tokens = seq.positions.numel()
        longest = min(seq.max_seqlen or length, length)
        self.index = (starts[:-1, None] + torch.arange(longest, device=device)).clamp(max=self.n_tokens - 1)
        place = torch.arange(self.n_tokens, device=device)
        self.document = torch.searchsorted(starts[1:].contiguous(), place, right=True).clamp(max=len(starts) - 2)
        self.place = (place - starts[self.document]).clamp(max=longest - 1)
        self.shape = seq.positions.shape

    def split(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [documents, longest, ...]."""
        return x.flatten(0, 1)[self.index]

    def join(self, y: Tensor) -> Tensor:
        """[documents, longest, ...] -> [B, T, ...]."""
        return y[self.document, self.place].unflatten(0, self.shape)
