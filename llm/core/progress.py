"""Progress: how far a training run has come, told to every part that changes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Progress:
    """step: index of the optimizer step about to be taken, from 0. total_steps, seed: those of the run.

    What a part derives from it must be a pure function of these three, so that every rank, every microbatch of a step
    and a resumed run agree.
    """

    step: int
    total_steps: int
    seed: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 at the first step."""
        return self.step / max(1, self.total_steps)


def before_step(model: nn.Module, progress: Progress) -> None:
    """Call `before_step(progress)` of every module that has such a method; the trainer does so before each step."""
    for module in model.modules():
        hook: Any = getattr(module, "before_step", None)
        if hook is not None:
            hook(progress)
