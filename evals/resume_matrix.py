"""usage: resume_matrix.py [--kills N] [--seed S] [--work DIR] [--no-worlds]

Show that resume is exact. Every run is `launch/train.py` in processes of its own, on the CPU.

  1. One model is trained 60 steps straight. Then the same run is killed with SIGKILL again and again, at random moments
     (in start-up, between steps, during saves) and at every stage of a save, and started again until it is done: its
     metrics.jsonl must hold the same losses, gradient norms and evaluations to the last bit, one line per step, and
     its last checkpoint the same weights.
  2. 20 steps by 2 processes, 20 by 4, 20 by 1: the same losses as 60 by 1 within 1e-4 relative, and the same rows of
     data in every step.

Prints a table and a last line of JSON; exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402

from llm.checkpoint import load_meta, load_model_tensors, resolve_checkpoint  # noqa: E402
from llm.checkpoint.faults import STAGES, VARIABLE  # noqa: E402
from llm.core.errors import UserError  # noqa: E402
from llm.data.config import DataConfig  # noqa: E402
from llm.data.loader import Loader  # noqa: E402

STEPS, SAVE_EVERY = 60, 5
TOLERANCE = 1e-4
EXACT = {"loss", "grad_norm", "lr", "tokens", "num_labels", "skipped", "perplexity", "bits_per_byte", "bits_per_token"}
SLOW_SAVE = "*=sleep:0.02"


@dataclass
class Kill:
    """One kill -9. where: "clock" (seconds since the start), "step", "save" (while files are written) or a stage."""

    where: str
    at: float = 0.0

    def __str__(self) -> str:
        if self.where in STAGES:
            return f"stage {self.where}"
        return f"{self.where} {self.at:.2f}" if self.where == "clock" else f"{self.where} >= {self.at:.0f}"


@dataclass
class Row:
    """A line of the table."""

    name: str
    kills: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def prepare(work: Path) -> None:
    """Prepared data of about 200 kB: some of the running Python's own modules, as bytes."""
    text = work / "text"
    text.mkdir(parents=True, exist_ok=True)
    for name in ("argparse", "ast", "inspect", "typing", "tarfile"):
        module = __import__(name)
        (text / f"{name}.txt").write_text(Path(str(module.__file__)).read_text())
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
    finish("prepare.py", [str(path)], work / "output.log")


def write_config(work: Path) -> Path:
    """A model of 20 thousand parameters with all that a resume could get wrong: dropout (random numbers), Muon and
    AdamW states, a schedule, spike statistics, evaluation, asynchronous saves."""
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu"}}
    config = {
        "name": "straight",
        "runs_dir": str(work / "runs"),
        "model": {"d_model": 16, "max_seq_len": 32, "dropout": 0.1, "layers": [{"pattern": [block], "repeat": 2}]},
        "data": {"path": str(work / "data"), "seq_len": 32},
        "train": {
            "steps": STEPS,
            "batch_tokens": 256,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
            "num_threads": 1,
            "anomaly": {"sigma": 6.0, "window": 16},
        },
        "optim": {"type": "muon", "lr": 0.01, "adam_lr": 0.003},
        "schedule": {"type": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.5},
        "checkpoint": {"every_steps": SAVE_EVERY},
        "eval": {"every_steps": 15, "batches": 2},
        "log": {"progress": False, "report": False},
    }
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(
    script: str, arguments: list[str], log: Path, *, fault: str = "", processes: int = 1
) -> subprocess.Popen[bytes]:
    """Start a command as a user does; `fault` is for llm/checkpoint/faults.py. Output goes to the end of `log`."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, VARIABLE: fault, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("a") as out:
        return subprocess.Popen(
            [*words, str(ROOT / "launch" / script), *arguments], env=env, stdout=out, stderr=subprocess.STDOUT
        )


def finish(script: str, arguments: list[str], log: Path, *, processes: int = 1) -> None:
    """Run a command to its end; UserError with the last lines of its output when that fails."""
    code = start(script, arguments, log, processes=processes).wait()
    if code:
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise UserError(f"{script} {' '.join(arguments)} ended with code {code}:\n{last}")


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind in metrics.jsonl, in order, without a last line that is cut off."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def train_and_kill(arguments: list[str], kill: Kill, run: Path, log: Path, rng: random.Random) -> bool:
    """Start the run and kill it as told. False when it was done before the moment came."""
    fault = {"save": SLOW_SAVE, "clock": SLOW_SAVE, "step": ""}.get(kill.where, f"{kill.where}=kill")
    child = start("train.py", arguments, log, fault=fault)
    started = time.monotonic()
    while child.poll() is None and not _moment_has_come(kill, run, time.monotonic() - started):
        time.sleep(0.002)
    if child.poll() is None:
        time.sleep(rng.uniform(0, 0.06))
        child.kill()
    return child.wait() == -signal.SIGKILL


def _moment_has_come(kill: Kill, run: Path, seconds: float) -> bool:
    if kill.where == "clock":
        return seconds >= kill.at
    if kill.where in STAGES:
        return False
    steps = records(run, "train")
    if not steps or steps[-1]["step"] < kill.at:
        return False
    return kill.where == "step" or any(".tmp-" in path.name for path in (run / "checkpoints").glob("step-*"))


def plan(n_kills: int, rng: random.Random) -> Iterator[list[Kill]]:
    """Kills, dealt out to runs of one to three: every stage of a save once, then random moments."""
    kills = [Kill(stage) for stage in STAGES if stage != "old-moved-away"][:n_kills]
    kinds = ["step", "save", "clock"]
    while len(kills) < n_kills:
        where = kinds[len(kills) % 3]
        kills.append(Kill(where, rng.uniform(0.3, 8.0) if where == "clock" else rng.randrange(1, STEPS - 2)))
    rng.shuffle(kills)
    while kills:
        count = min(rng.randrange(1, 4), len(kills))
        yield sorted(kills[:count], key=lambda kill: kill.at)
        del kills[:count]


def numbers(run: Path) -> dict[str, list[dict[str, Any]]]:
    """What must be the same: train and eval records without times and memory."""
    kept = {}
    for kind in ("train", "eval"):
        kept[kind] = [{k: v for k, v in record.items() if k in EXACT | {"step"}} for record in records(run, kind)]
    return kept


def compare(run: Path, straight: Path) -> list[str]:
    """What differs between two finished runs, bit by bit."""
    ours, theirs = numbers(run), numbers(straight)
    problems = []
    steps = [record["step"] for record in ours["train"]]
    if steps != list(range(1, STEPS + 1)):
        problems.append(f"metrics.jsonl has steps {steps}")
    for kind in ours:
        for mine, other in zip(ours[kind], theirs[kind]):
            if mine != other:
                keys = [key for key in other if mine.get(key) != other[key]]
                problems.append(f"{kind} record of step {other['step']} differs in {', '.join(keys)}")
                break
        if len(ours[kind]) != len(theirs[kind]):
            problems.append(f"{len(ours[kind])} {kind} records instead of {len(theirs[kind])}")
    a, b = (load_model_tensors(resolve_checkpoint(path)) for path in (run, straight))
    differing = [name for name in b if not torch.equal(a[name], b[name])]
    if differing:
        problems.append(f"{len(differing)} of {len(b)} tensors differ")
    return problems


def lost(run: Path) -> list[str]:
    """After a kill: a checkpoint that was reported saved must still be there, or a newer one."""
    saved = [record["step"] for record in records(run, "checkpoint")]
    if not saved:
        return []
    try:
        step = load_meta(resolve_checkpoint(run))["step"]
    except UserError as error:
        return [f"step {saved[-1]} was saved, now: {error}"]
    return [] if step >= saved[-1] else [f"step {saved[-1]} was saved, the last good one is {step}"]


def kill_matrix(work: Path, n_kills: int, seed: int) -> Iterator[Row]:
    """Part 1, run by run. At least `n_kills` kills are dealt out."""
    rng = random.Random(seed)
    config = write_config(work)
    log = work / "output.log"
    started = time.monotonic()
    finish("train.py", [str(config)], log)
    straight = work / "runs" / "straight"
    yield Row("straight", seconds=time.monotonic() - started)
    for number, kills in enumerate(plan(n_kills, rng)):
        row = Row(f"killed-{number}")
        run = work / "runs" / row.name
        arguments = [str(config), f"name={row.name}"]
        started = time.monotonic()
        for kill in kills:
            if not train_and_kill(arguments, kill, run, log, rng):
                if kill.where in STAGES:
                    row.problems.append(f"the run was done before {kill}")
                continue
            steps = records(run, "train")
            row.kills.append(f"{kill} (at {steps[-1]['step'] if steps else 0})")
            row.problems += lost(run)
        finish("train.py", arguments, log)
        row.resumed_at = [record["step"] for record in records(run, "start")]
        row.problems += compare(run, straight)
        row.seconds = time.monotonic() - started
        yield row


def world_matrix(work: Path) -> Iterator[Row]:
    """Part 2: 2 processes -> 4 -> 1, against one alone."""
    config, log = write_config(work), work / "output.log"
    changed = yaml.safe_load(config.read_text())
    changed["optim"] = {"type": "adamw", "lr": 0.003}
    changed["schedule"] = {"type": "constant", "warmup_tokens": 2560}
    changed["model"]["dropout"] = 0.0
    changed["train"]["micro_batch_size"] = 1
    config = work / "worlds.yaml"
    config.write_text(yaml.safe_dump(changed))
    finish("train.py", [str(config), "name=alone"], log)
    alone = [record["loss"] for record in records(work / "runs" / "alone", "train")]
    for first, second in (("ddp", "fsdp2"), ("fsdp2", "fsdp2")):
        row = Row(f"2 {first} -> 4 {second} -> 1")
        name = f"worlds-{first}-{second}"
        run = work / "runs" / name
        started = time.monotonic()
        for processes, strategy, steps in ((2, first, 20), (4, second, 40), (1, "single", 60)):
            overrides = [f"name={name}", f"parallel.strategy={strategy}", f"train.steps={steps}"]
            finish("train.py", [str(config), *overrides], log, processes=processes)
            row.resumed_at.append(records(run, "start")[-1]["step"])
        losses = [record["loss"] for record in records(run, "train")]
        if len(losses) != len(alone):
            row.problems.append(f"{len(losses)} steps instead of {len(alone)}")
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, alone))
        row.kills.append(f"largest relative difference of a loss {worst:.1e}")
        if worst > TOLERANCE:
            row.problems.append(f"losses differ by {worst:.1e} relative, more than {TOLERANCE}")
        row.seconds = time.monotonic() - started
        yield row
    yield data_order(work / "data")


def data_order(data: Path) -> Row:
    """The rows of each step, hashed, for one rank alone and for 2 -> 4 -> 1 ranks with the loader's state handed on."""
    row = Row("data order 2 -> 4 -> 1")
    started = time.monotonic()
    want, _ = _row_hashes(data, 1, STEPS, None)
    got: list[str] = []
    state: Any = None
    for world_size in (2, 4, 1):
        hashes, state = _row_hashes(data, world_size, STEPS // 3, state)
        got += hashes
        row.resumed_at.append(len(got) - STEPS // 3)
    differing = [step for step, (a, b) in enumerate(zip(got, want, strict=True), start=1) if a != b]
    row.kills.append(f"{len(set(want))} distinct steps of 8 rows")
    if differing:
        row.problems.append(f"other rows in steps {differing}")
    row.seconds = time.monotonic() - started
    return row


def _row_hashes(data: Path, world_size: int, steps: int, state: Any) -> tuple[list[str], Any]:
    """A hash of the set of rows in each of `steps` steps over all ranks, and the loader's state after them."""
    loaders = [
        Loader(
            DataConfig(path=str(data), seq_len=32, prefetch=0),
            split="train",
            sequences_per_step=8,
            micro_batch_size=1,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for loader in loaders:
        if state is not None:
            loader.load(state)
    hashes = []
    streams = [iter(loader) for loader in loaders]
    for _ in range(steps):
        rows = [
            (tokens.tolist(), labels.tolist())
            for stream in streams
            for microbatch in next(stream).microbatches
            for tokens, labels in zip(microbatch.tokens, microbatch.labels, strict=True)
        ]
        hashes.append(hashlib.sha256(repr(sorted(rows)).encode()).hexdigest())
    return hashes, loaders[0].state()


def show(row: Row) -> None:
    """Print one line of the table."""
    verdict = "; ".join(row.problems) if row.problems else "equal"
    starts = ", ".join(map(str, row.resumed_at)) or "-"
    detail = "; ".join(row.kills) or "-"
    print(f"| {row.name} | {detail} | {starts} | {row.seconds:.1f} | {verdict} |", flush=True)


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="resume_matrix", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--no-worlds", action="store_true")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        work = given.work or Path(folder)
        prepare(work)
        print("| run | kill -9 at | starts at step | seconds | against the straight run |\n|---|---|---|---|---|")
        rows = []
        for row in kill_matrix(work, given.kills, given.seed):
            show(row)
            rows.append(row)
        n_kills = sum(len(row.kills) for row in rows)
        for row in [] if given.no_worlds else world_matrix(work):
            show(row)
            rows.append(row)
    bad = [row.name for row in rows if row.problems]
    summary = {"kills": n_kills, "runs": len(rows), "different": bad, "steps": STEPS, "seed": given.seed}
    summary |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps(summary))
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"resume_matrix: {error}")
