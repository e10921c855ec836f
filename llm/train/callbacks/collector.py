"""Python's garbage collector, kept out of the steps: ranks that collect at different times wait for one another."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, ClassVar

from llm.train.callbacks.base import Callback, StepOut

if TYPE_CHECKING:
    from llm.train.trainer import Trainer


class GarbageCollection(Callback):
    """Freezes what exists at the start, turns automatic collection off, and collects on all ranks at the same steps."""

    order: ClassVar[int] = 1

    def __init__(self, every: int = 500) -> None:
        self.every = every
        self._was_enabled = False

    def on_start(self, trainer: Trainer) -> None:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if out.step % self.every == 0:
            gc.collect(1)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._restore()

    def on_end(self, trainer: Trainer) -> None:
        self._restore()

    def _restore(self) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
