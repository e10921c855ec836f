"""The report at the end of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llm.train.callbacks.base import Callback
from llm.train.callbacks.console import Console

if TYPE_CHECKING:
    from llm.train.trainer import Trainer


class Report(Callback):
    """Writes run_dir/report.html and loss.png when the run ends, also when it ends by an error."""

    order: ClassVar[int] = 95

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.on_end(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        from llm.train.report import write_report

        path = write_report(trainer.run_dir)
        if self.console is not None:
            self.console.say(f"report: {path}")
