"""metrics.jsonl: the run's history, one JSON object a line, from which the report is made."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from torch import Tensor

from llm.core.errors import UserError
from llm.train.callbacks.base import Callback, StepOut
from llm.train.callbacks.environment import environment

if TYPE_CHECKING:
    from llm.checkpoint import CheckpointInfo
    from llm.train.trainer import Trainer

FILE_NAME = "metrics.jsonl"


def encode(record: dict[str, Any]) -> str:
    """One line of strict JSON. Floats round-trip exactly; those that are not finite become "nan", "inf" or "-inf"."""
    return json.dumps(_finite(record), allow_nan=False, separators=(", ", ": "))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    words = ("nan", "inf", "-inf")
    return {key: float(value) if isinstance(value, str) and value in words else value for key, value in record.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that was cut off by a kill is passed over; UserError for another."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a run, such as runs/NAME")
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}); remove that line") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise UserError(f"{path}: line {number} is not a record with a 'kind'; remove that line")
        records.append(_numbers(record))
    return records


def rewind(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the records that `keep` accepts, and no half line; the file is replaced in one step."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if keep(record)]
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(encode(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class JsonlWriter(Callback):
    """Writes metrics.jsonl on rank 0, by kind: start, train (one per step), eval, checkpoint, anomaly, sample, end.

    A run that resumes at step s first drops the records after s; a rollback drops what it takes back, but keeps the
    anomalies. Lines are flushed as they are written, and synced to disk with each checkpoint.
    """

    order: ClassVar[int] = 50

    def __init__(self) -> None:
        self.file: TextIO | None = None
        self.path: Path | None = None
        self.last_step = 0
        self.judged_step = 0

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        trainer.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = trainer.run_dir / FILE_NAME
        resumed = trainer.step
        rewind(self.path, lambda record: 0 < resumed and record["step"] <= resumed and record["kind"] != "end")
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        self.last_step = resumed
        strategy, cost = trainer.strategy, trainer.model_cost
        fields: dict[str, Any] = {
            "total_steps": trainer.total_steps,
            "total_tokens": trainer.total_tokens,
            "name": trainer.run.name,
            "config_hash": trainer.parts.config_hash,
            "strategy": strategy.name,
        }
        if cost is not None:
            fields["parameters"] = cost.total.params
            fields["active_parameters"] = cost.total.active_params
            fields["forward_flops_per_token"] = cost.total.flops_per_token
        fields |= environment(strategy.device, strategy.world_size)
        self.write("start", trainer, **fields)

    def before_optim(self, trainer: Trainer, grad_norm: Tensor) -> None:
        self._write_anomalies(trainer)
        self.judged_step = trainer.step + 1

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        if self.file is None:
            return
        if out.step <= self.last_step:
            self._drop_from(out.step)
        self._write_anomalies(trainer)
        self.last_step = out.step
        self._write(
            {
                "kind": "train",
                "step": out.step,
                "tokens": out.tokens,
                "loss": out.loss,
                "grad_norm": out.grad_norm,
                "lr": out.lr,
                "seconds": out.seconds,
                "num_labels": out.n_valid,
                "skipped": out.skipped,
                "time": time.time(),
            }
            | out.metrics
        )

    def on_eval(self, trainer: Trainer, result: dict[str, float]) -> None:
        self.write("eval", trainer, **result)

    def on_saved(self, trainer: Trainer, info: CheckpointInfo) -> None:
        fields = {"step": info.step, "tokens": info.tokens, "path": info.path.name, "saved_as": info.kind}
        self.write("checkpoint", trainer, **fields)
        if self.file is not None:
            os.fsync(self.file.fileno())

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._write_anomalies(trainer)
        self.write("end", trainer, reason=f"{type(error).__name__}: {error}"[:500])
        self.close()

    def on_end(self, trainer: Trainer) -> None:
        self._write_anomalies(trainer)
        self.write("end", trainer, reason="done" if trainer.step >= trainer.total_steps else "stopped")
        self.close()

    def write(self, kind: str, trainer: Trainer, **fields: Any) -> None:
        """Add a record at the trainer's present step; nothing on ranks other than 0."""
        if self.file is not None:
            self._write({"kind": kind, "step": trainer.step, "tokens": trainer.tokens, "time": time.time()} | fields)

    def _write(self, record: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.write(encode(record) + "\n")

    def _write_anomalies(self, trainer: Trainer) -> None:
        for event in trainer.anomaly.take_events():
            self.write("anomaly", trainer, **{"step": self.judged_step} | event)

    def _drop_from(self, step: int) -> None:
        assert self.file is not None and self.path is not None
        self.file.close()
        rewind(self.path, lambda record: record["step"] < step or record["kind"] in ("anomaly", "start"))
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        """Sync and close the file; further records are dropped."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None
