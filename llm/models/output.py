"""What a decoder and every wrapper around one give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Output:
    """hidden [B, T, D] after the final norm, ready for `head`; carry: segment memory for the next training segment.

    While training, a wrapper may ask for a loss on more than the last hidden states: `weight` is that of `hidden`, and
    `extra` holds further (hidden [B, T, D], weight), each scored against the same labels and added.
    """

    hidden: Tensor
    carry: Any = None
    weight: float = 1.0
    extra: tuple[tuple[Tensor, float], ...] = ()
