"""What a person sees while a run goes on: a live progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from llm.train.callbacks.base import Callback, StepOut
from llm.train.callbacks.throughput import Throughput
from llm.train.hardware import device_name

if TYPE_CHECKING:
    from llm.checkpoint import CheckpointInfo
    from llm.train.trainer import Trainer


def human(value: float) -> str:
    """A count in three figures: 950, 1.25k, 12.3M, 4.2B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, 4:05; "-" when not known."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console(Callback):
    """Rank 0's display: step, loss, bits per byte (of the last evaluation), learning rate, gradient norm, tokens per
    second, MFU, time left."""

    order: ClassVar[int] = 60

    def __init__(self, throughput: Throughput, *, progress: bool = True, stream: Any = None) -> None:
        self.throughput = throughput
        self.progress = progress
        self.stream = stream or sys.stderr
        self.bar: Any = None
        self.task: Any = None
        self.bits_per_byte: float | None = None

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        strategy, cost = trainer.strategy, trainer.model_cost
        size = f", {human(cost.total.params)} parameters" if cost is not None else ""
        times = f"{strategy.world_size} x " if strategy.world_size > 1 else ""
        place = times + device_name(strategy.device)
        start = f", resumed at step {trainer.step:,}" if trainer.step else ""
        self.say(
            f"{trainer.run.name}: {trainer.total_steps:,} steps, {human(trainer.total_tokens)} tokens{size}; "
            f"{strategy.name} on {place}{start}; files in {trainer.run_dir}"
        )
        if self.progress and self.stream.isatty():
            self._open_bar(trainer)

    def _open_bar(self, trainer: Trainer) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        self.bar = Progress(
            TextColumn("[bold]{task.completed:,}[/]/{task.total:,}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=RichConsole(file=self.stream),
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("train", total=trainer.total_steps, completed=trainer.step, text="starting")
        self.bar.start()

    def describe(self, trainer: Trainer, out: StepOut) -> str:
        """The figures of a step in one line."""
        speed = self.throughput.mean_tokens_per_second
        left = (trainer.total_tokens - out.tokens) / speed if speed else math.inf
        parts = [f"loss {out.loss:.4f}"]
        if self.bits_per_byte is not None:
            parts.append(f"bpb {self.bits_per_byte:.4f}")
        parts += [f"lr {out.lr:.2e}", f"grad {out.grad_norm:.2f}", f"{human(speed)} tok/s"]
        if out.metrics.get("mfu"):
            parts.append(f"MFU {100 * out.metrics['mfu']:.1f}%")
        parts.append(f"left {duration(left)}")
        if out.skipped:
            parts.append("SKIPPED")
        return "  ".join(parts)

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if not trainer.is_main:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=out.step, text=self.describe(trainer, out))
        if out.skipped:
            self.say(f"step {out.step:,} left out: {trainer.anomaly.reason}")
        elif self.bar is None and self._is_shown(trainer, out.step):
            width = len(str(trainer.total_steps))
            self.say(f"step {out.step:>{width}}/{trainer.total_steps}  {self.describe(trainer, out)}")

    def _is_shown(self, trainer: Trainer, step: int) -> bool:
        return step == 1 or step == trainer.total_steps or step % trainer.run.train.log_every == 0

    def on_eval(self, trainer: Trainer, result: dict[str, float]) -> None:
        self.bits_per_byte = result.get("bits_per_byte")
        if not trainer.is_main:
            return
        bytes_part = f", {self.bits_per_byte:.4f} bits per byte" if self.bits_per_byte is not None else ""
        self.say(
            f"step {trainer.step:,}: held-out loss {result['loss']:.4f}{bytes_part}, perplexity "
            f"{result['perplexity']:.4g} over {human(result['num_tokens'])} tokens"
        )

    def on_saved(self, trainer: Trainer, info: CheckpointInfo) -> None:
        if trainer.is_main:
            self.say(f"saved {info.path.name}")

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.close()

    def on_end(self, trainer: Trainer) -> None:
        self.close()

    def say(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the bar on the screen as it is."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
