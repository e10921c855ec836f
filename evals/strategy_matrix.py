"""usage: strategy_matrix.py [CONFIG.yaml] [key=value ...] [--steps N] [--work DIR] [--only NAME ...] [--no-resume]

Show that a run does not depend on how it is spread: the same config (default configs/run/quickstart.yaml, in fp32 and
with short steps) is trained by `torchrun launch/train.py` on the CPU under every strategy and accumulation.

  1. Per-step losses must equal those of one process within 1e-4 relative.
  2. The last checkpoint of each is taken up by one process and by two with FSDP2, for 10 more steps, with the same
     tolerance.

Data: a small corpus of the running Python's own modules, prepared in the work folder; data.path=... takes another.
Prints a table and a last line of JSON; exit code 1 when a difference is too large.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402

from llm.core.errors import UserError, unknown_name  # noqa: E402

TOLERANCE = 1e-4
MORE_STEPS = 10
SEQUENCES, SEQ_LEN = 16, 128
SHORT = [
    "train.tokens=null",
    f"train.batch_tokens={SEQUENCES * SEQ_LEN}",
    f"data.seq_len={SEQ_LEN}",
    "train.precision=fp32",
    "train.device=cpu",
    "train.num_threads=1",
    "schedule={type: constant, warmup_tokens: 20000}",
    "eval={at_end: false}",
    "checkpoint={asynchronous: false}",
    "log={progress: false, report: false}",
]


@dataclass(frozen=True)
class Case:
    """One way to spread a run; `accumulations` are the numbers of microbatches per step."""

    name: str
    processes: int
    parallel: tuple[str, ...]
    accumulations: tuple[int, ...] = (1,)


CASES = (
    Case("single", 1, ("parallel.strategy=single",), (1, 2, 4)),
    Case("ddp-2", 2, ("parallel.strategy=ddp",), (1, 2, 4)),
    Case("fsdp2-2", 2, ("parallel.strategy=fsdp2",), (1, 2, 4)),
    Case("zero1-2", 2, ("parallel.strategy=deepspeed", "parallel.zero_stage=1"), (1, 2)),
    Case("zero2-2", 2, ("parallel.strategy=deepspeed", "parallel.zero_stage=2"), (1, 2)),
    Case("zero3-2", 2, ("parallel.strategy=deepspeed", "parallel.zero_stage=3"), (1, 2)),
    Case("fsdp2-4", 4, ("parallel.strategy=fsdp2",), (1, 2)),
    Case("hsdp-2x2", 4, ("parallel.strategy=fsdp2", "parallel.replicate=2"), (1, 2)),
)
TAKERS = tuple(case for case in CASES if case.name in ("single", "fsdp2-2"))


@dataclass
class Row:
    """A line of the table. difference: largest relative one of a loss, or None where the run failed."""

    name: str
    difference: float | None
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.difference is not None and self.difference <= TOLERANCE


def prepare(work: Path) -> Path:
    """Prepared data of about 200 kB, bytes as tokens."""
    text = work / "text"
    text.mkdir(parents=True, exist_ok=True)
    for name in ("argparse", "ast", "inspect", "typing", "tarfile"):
        (text / f"{name}.txt").write_text(Path(str(__import__(name).__file__)).read_text())
    config = {
        "sources": [{"type": "text", "paths": [str(text)]}],
        "tokenizer": {"kind": "bytes"},
        "holdout": {"fraction": 0.2},
        "out": str(work / "data"),
        "workers": 1,
        "overwrite": True,
    }
    path = work / "prepare.yaml"
    path.write_text(yaml.safe_dump(config))
    launch("prepare.py", [str(path)], work / "output.log")
    return work / "data"


def launch(script: str, arguments: list[str], log: Path, *, processes: int = 1) -> None:
    """Run a command as a user does; UserError with the end of its output when it fails."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as out:
        done = subprocess.run(
            [*words, str(ROOT / "launch" / script), *arguments], env=env, stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-12:])
        raise UserError(
            f"{script} {' '.join(arguments)} on {processes} processes ended with code {done.returncode}:\n{last}"
        )


def losses(run_dir: Path) -> list[float]:
    """Per-step losses of a run."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def largest(found: list[float], expected: list[float]) -> float:
    """Largest relative difference; infinite when a step is missing."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


class Matrix:
    """All runs of one base config in one work folder."""

    def __init__(self, base: list[str], work: Path, steps: int) -> None:
        self.base = base
        self.work = work
        self.steps = steps
        self.reference: list[float] = []

    def train(self, name: str, case: Case, accumulation: int, steps: int) -> list[float]:
        """Losses of a run, which goes on from where its folder left it."""
        rows = SEQUENCES // case.processes // accumulation
        extra = [
            f"name={name}",
            f"runs_dir={self.work / 'runs'}",
            f"train.steps={steps}",
            f"train.micro_batch_size={rows}",
        ]
        launch("train.py", [*self.base, *extra, *case.parallel], self.work / f"{name}.log", processes=case.processes)
        return losses(self.work / "runs" / name)

    def row(self, name: str, case: Case, accumulation: int, steps: int) -> Row:
        """Train and compare with the reference."""
        started = time.monotonic()
        try:
            found = self.train(name, case, accumulation, steps)
        except UserError as error:
            print(error, file=sys.stderr)
            return Row(name, None, time.monotonic() - started, "failed")
        return Row(name, largest(found, self.reference[:steps]), time.monotonic() - started)

    def run(self, only: list[str], resume: bool) -> list[Row]:
        """Every case, printed as it is done."""
        started = time.monotonic()
        self.reference = self.train("reference", CASES[0], 1, self.steps + MORE_STEPS)
        first, last = self.reference[0], self.reference[-1]
        seconds = time.monotonic() - started
        print(
            f"one process: loss {first:.4f} -> {last:.4f} in {len(self.reference)} steps, {seconds:.0f} s", flush=True
        )
        rows: list[Row] = []
        for case in CASES:
            if only and case.name not in only:
                continue
            for accumulation in case.accumulations:
                self._add(rows, self.row(f"{case.name}-accumulate-{accumulation}", case, accumulation, self.steps))
            if not resume or not rows[-1].ok:
                continue
            for taker in TAKERS:
                source, target = (self.work / "runs" / name for name in (rows[-1].name, f"{case.name}-to-{taker.name}"))
                if source.name == target.name or case is taker:
                    continue
                shutil.copytree(source, target)
                self._add(rows, self.row(target.name, taker, 1, self.steps + MORE_STEPS))
        return rows

    def _add(self, rows: list[Row], row: Row) -> None:
        rows.append(row)
        shown = "failed" if row.difference is None else f"{row.difference:.1e}"
        print(f"{row.name:<28} {shown:>9}  {'ok' if row.ok else 'TOO FAR':<8} {row.seconds:5.0f} s", flush=True)


def main(argv: list[str]) -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--no-resume", action="store_true")
    options = parser.parse_args(argv)
    for name in options.only:
        if name not in {case.name for case in CASES}:
            raise UserError(unknown_name("case", name, [case.name for case in CASES]))
    work = options.work or Path(tempfile.mkdtemp(prefix="strategy-matrix-"))
    work.mkdir(parents=True, exist_ok=True)
    arguments = list(options.arguments)
    config = arguments.pop(0) if arguments and "=" not in arguments[0] else str(ROOT / "configs/run/quickstart.yaml")
    if not any(argument.startswith("data.path=") for argument in arguments):
        arguments.append(f"data.path={prepare(work)}")
    rows = Matrix([config, *SHORT, *arguments], work, options.steps).run(options.only, not options.no_resume)
    worst = max((row.difference for row in rows if row.difference is not None), default=float("nan"))
    result: dict[str, Any] = {
        "tool": "strategy_matrix",
        "steps": options.steps,
        "runs": len(rows),
        "largest_relative_difference": worst,
        "tolerance": TOLERANCE,
        "ok": all(row.ok for row in rows),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))
    if result["ok"] and options.work is None:
        shutil.rmtree(work)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"strategy_matrix: {error}", file=sys.stderr)
        sys.exit(2)
