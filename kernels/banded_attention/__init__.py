"""Softmax attention along a band: each query sees the last `window` tokens of its segment, in linear time.

q, k [B, N, H, D], v [B, N, H, V]. Query i sees key j where 0 <= i - j < window and segments[i] == segments[j]; segments
[B, N] int are those of packed documents, buckets of a hash, or any other runs of tokens. score = scale * q·k - slope *
(positions[i] - positions[j]), with slopes [B or 1, H] and positions [B, N] where both are given; but self_score for
i == j where that is given.
"""

from __future__ import annotations

from kernels.banded_attention.blocked import banded_attention, merge
from kernels.banded_attention.reference import banded_attention_reference

__all__ = ["banded_attention", "banded_attention_reference", "merge"]
