"""What a loader hands to the trainer: the microbatches of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm.core.seq import SeqInfo

IGNORE = -100
"""Label of a position that is not scored."""


@dataclass
class Microbatch:
    """tokens [B, T] int64, labels [B, T] int64 (next token, IGNORE where not scored), their sequence description."""

    tokens: Tensor
    labels: Tensor
    seq: SeqInfo

    def to(self, device: torch.device | str) -> Microbatch:
        """The same microbatch on `device`, copied without blocking where the memory is pinned."""
        return Microbatch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.seq.to(device, non_blocking=True),
        )


@dataclass
class StepBatch:
    """This rank's microbatches of one optimizer step.

    num_tokens: input tokens of the step over all ranks. The number of valid labels is counted on device and reduced by
    the trainer, since it depends on the data.
    """

    microbatches: list[Microbatch]
    num_tokens: int
