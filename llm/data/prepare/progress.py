"""Progress of a preparation: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self


class Progress:
    """Bytes, documents and rejects so far. n_bytes: all the input, 0 where it is not known."""

    def __init__(self, n_bytes: int, *, quiet: bool = False, interval: float = 10.0) -> None:
        self.total = n_bytes
        self.quiet = quiet
        self.interval = interval
        self.done = [0, 0, 0]
        self._said = self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:>9}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, stage: str) -> None:
        """Name what begins now."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(stage, total=self.total or None, note="")
            self._bar.update(self._task, description=stage, completed=self.done[0])
        self._start = time.monotonic()

    def advance(self, n_bytes: int, documents: int, rejects: int) -> None:
        """Add to what is done."""
        for i, amount in enumerate((n_bytes, documents, rejects)):
            self.done[i] += amount
        note = f"{self.done[1]:,} documents" + (f", {self.done[2]:,} rejected" if self.done[2] else "")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done[0], note=note)
        elif not self.quiet and self._bar is None and time.monotonic() - self._said > self.interval:
            self._said = time.monotonic()
            of = f" of {self.total / 1e6:,.0f}" if self.total else ""
            print(f"prepare: {self.done[0] / 1e6:,.0f}{of} MB, {note}", file=sys.stderr, flush=True)

    def start_merge(self, n_bytes: int) -> None:
        """Begin the second bar: joining the parts."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, total=self.done[0], completed=self.done[0])
            self._task = self._bar.add_task("join", total=n_bytes, note="")

    def advance_merge(self, n_bytes: int) -> None:
        """Add to the bytes joined."""
        if self._bar is not None:
            self._bar.advance(self._task, n_bytes)
