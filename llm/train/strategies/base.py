"""The protocol of a strategy: the trainer owns the loop, accumulation and the loss; a strategy, where things live."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass
class NamedState:
    """Model and optimizer tensors by dotted parameter name, whatever engine or world size holds them.

    model: name -> tensor or DTensor. optim: parameter name -> {"exp_avg": tensor, ..., "step": tensor}.
    A tied parameter appears once, under the embedding's name.
    """

    model: dict[str, Tensor]
    optim: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Strategy(Protocol):
    """One of single, ddp, fsdp2 (and HSDP), deepspeed."""

    name: str
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """What the trainer calls: a DecoderLike, materialised and initialised by `setup`."""

    def setup(self, model: nn.Module, run: Any, seed: int) -> None:
        """Take a model on meta: activation checkpointing, compile per block, shard, materialise, initialise by name,
        tie again, build the optimizer."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around each microbatch's forward and backward; gradients are reduced over ranks in the last one."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward pass's precision."""

    def backward(self, loss: Tensor) -> None:
        """Gradient of a loss already divided by the global token count: ranks are summed, nothing is divided again."""

    def clip(self, max_norm: float | None) -> Tensor:
        """Global gradient norm before clipping, a device scalar; clips when max_norm is given."""

    def step(self, lr_factor: float, skip: bool) -> None:
        """Update at lr * lr_factor unless `skip`, then clear the gradients."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def state(self) -> NamedState:
        """Live tensors, for saving. Optimizer entries exist also before the first step (zeros)."""

    def load(self, state: NamedState) -> None:
        """Take tensors written by `state` under any strategy (already placed by the checkpointer)."""

    def unsharded(self) -> AbstractContextManager[nn.Module]:
        """The model for evaluation and sampling in the loop."""

    def close(self) -> None:
        """Leave the process group, if this strategy made it."""
