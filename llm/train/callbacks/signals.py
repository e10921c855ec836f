"""Signals of a scheduler or a person: save, stop, and let the run be started again."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, ClassVar

from llm.train.callbacks.base import Callback

if TYPE_CHECKING:
    from llm.train.trainer import Trainer

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals(Callback):
    """Remembers the first SIGTERM, SIGINT or SIGUSR1 in `requested` (its name), which the trainer reads once per step.

    A second SIGINT interrupts at once. The handlers are taken back when the run ends.
    """

    order: ClassVar[int] = 0

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a signal asked to save and stop."""
        return self.requested is not None

    def on_start(self, trainer: Trainer) -> None:
        self.install()

    def install(self) -> None:
        """Take the handlers; may be called earlier than on_start. Python allows it in the main thread only."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in CAUGHT:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested is not None and number == signal.SIGINT:
            self.restore()
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        again = "; once more to end at once" if number == signal.SIGINT else ""
        sys.stderr.write(f"{self.requested}: saving after this step, then stopping{again}\n")

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.restore()

    def on_end(self, trainer: Trainer) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()
