"""A profiler trace of some steps, and a snapshot of CUDA memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llm.core.errors import UserError
from llm.train.callbacks.base import Callback, StepOut

if TYPE_CHECKING:
    from llm.train.trainer import Trainer


class Profiler(Callback):
    """Traces steps first..last on rank 0 into run_dir/profile: a trace for Perfetto or chrome://tracing, and a table of
    the operators that took longest."""

    order: ClassVar[int] = 5

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.profile: Any = None

    def on_start(self, trainer: Trainer) -> None:
        self._begin(trainer, trainer.step + 1)

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if self.profile is not None and out.step >= self.last:
            self._finish(trainer)
        self._begin(trainer, out.step + 1)

    def _begin(self, trainer: Trainer, next_step: int) -> None:
        if self.profile is not None or next_step != self.first or not trainer.is_main:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if trainer.strategy.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self.profile.start()

    def _finish(self, trainer: Trainer) -> None:
        self.profile.stop()
        folder = trainer.run_dir / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"steps-{self.first}-{self.last}"
        self.profile.export_chrome_trace(str(folder / f"{stem}.json.gz"))
        key = "self_cuda_time_total" if trainer.strategy.device.type == "cuda" else "self_cpu_time_total"
        table = self.profile.key_averages().table(sort_by=key, row_limit=40)
        (folder / f"{stem}.txt").write_text(table, encoding="utf-8")
        self.profile = None

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.on_end(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.profile is not None:
            self._finish(trainer)


class MemorySnapshot(Callback):
    """Records CUDA allocations of the first steps and writes run_dir/memory-rankN.pickle for pytorch.org/memory_viz, or
    earlier when the memory runs out. We only write that file, nothing here reads it."""

    order: ClassVar[int] = 6

    def __init__(self, steps: int = 3) -> None:
        self.steps = steps
        self.active = False
        self.until = 0

    def on_start(self, trainer: Trainer) -> None:
        if trainer.strategy.device.type != "cuda":
            raise UserError("log.memory_snapshot=true needs CUDA; this run is on a CPU: set log.memory_snapshot=false")
        torch.cuda.memory._record_memory_history(max_entries=200_000)
        self.active = True
        self.until = trainer.step + self.steps

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if out.step >= self.until:
            self._dump(trainer)

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._dump(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._dump(trainer)

    def _dump(self, trainer: Trainer) -> None:
        if not self.active:
            return
        self.active = False
        trainer.run_dir.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(trainer.run_dir / f"memory-rank{trainer.strategy.rank}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
