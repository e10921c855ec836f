"""Speed and memory of each step, added to the step's metrics so that every sink shows them."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, ClassVar

import torch

from llm.models.config import ModelCost
from llm.train.callbacks.base import Callback, StepOut
from llm.train.hardware import device_name, peak_flops, peak_memory

if TYPE_CHECKING:
    from llm.train.trainer import Trainer


def training_flops_per_token(cost: ModelCost) -> float:
    """Model FLOPs of one trained token: forward, and twice that backward; causal attention as executed (half)."""
    return 3.0 * cost.total.flops_per_token


def hardware_flops_per_token(cost: ModelCost, activation_checkpointing: str) -> float:
    """FLOPs of one trained token with what the backward pass computes again: every block under full activation
    checkpointing. Selective keeps the results of matrix products and attention, and the loss computes logits once."""
    recomputed = cost.blocks.flops_per_token if activation_checkpointing == "full" else 0.0
    return training_flops_per_token(cost) + recomputed


class Throughput(Callback):
    """Adds to each step's metrics: tokens_per_second (over all ranks), mfu and hfu.

    mfu: model FLOPs over the dense bf16 peak of all devices; hfu counts recomputation as well. Both are 0 where the
    peak is not known. `mean_tokens_per_second` is over the last `window` steps, for the console.
    """

    order: ClassVar[int] = 10

    def __init__(self, window: int = 20) -> None:
        self.recent: deque[tuple[int, float]] = deque(maxlen=window)
        self.tokens_before = 0
        self.peak = math.inf
        self.flops = self.hardware_flops = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self.tokens_before = trainer.tokens
        self.peak = peak_flops(device_name(trainer.strategy.device)) * trainer.strategy.world_size
        if trainer.model_cost is not None:
            train = trainer.run.train
            self.flops = training_flops_per_token(trainer.model_cost)
            self.hardware_flops = hardware_flops_per_token(trainer.model_cost, train.activation_checkpointing)

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        tokens = out.tokens - self.tokens_before
        self.tokens_before = out.tokens
        if tokens <= 0 or out.seconds <= 0:
            return
        speed = tokens / out.seconds
        self.recent.append((tokens, out.seconds))
        out.metrics["tokens_per_second"] = speed
        out.metrics["mfu"] = speed * self.flops / self.peak
        out.metrics["hfu"] = speed * self.hardware_flops / self.peak

    @property
    def mean_tokens_per_second(self) -> float:
        """Speed over the recent steps; the slowest, where compilation happened, is left out once there are several."""
        steps = sorted(self.recent, key=lambda step: step[1] / step[0])
        if len(steps) >= 5:
            steps = steps[:-1]
        seconds = sum(step[1] for step in steps)
        return sum(step[0] for step in steps) / seconds if seconds else 0.0


class Memory(Callback):
    """Adds memory_gib to each step's metrics: the peak of allocated CUDA memory since the run began on this rank, or
    the peak resident set on a CPU."""

    order: ClassVar[int] = 20

    def on_start(self, trainer: Trainer) -> None:
        if trainer.strategy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.device)

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        out.metrics["memory_gib"] = peak_memory(trainer.strategy.device) / 2**30
