"""Trainings of a comparison: ordinary runs of the real trainer in processes of their own, restartable."""

from __future__ import annotations

import copy
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.compare.config import CompareConfig
from evals.compare.solve import Matched
from llm.config.load import dump_config, read_tree, resolve, validate
from llm.core.errors import UserError
from llm.train.callbacks.jsonl import read_metrics
from llm.train.config import RunConfig

NOT_TRAINED = "not trained"

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"


@dataclass(frozen=True)
class Finished:
    """One run. error: the last line of what went wrong, else None."""

    candidate: str
    seed: int
    folder: Path
    error: str | None

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Its metrics of one kind."""
        path = self.folder / "metrics.jsonl"
        return [record for record in read_metrics(path) if record["kind"] == kind] if path.exists() else []


def run_config(config: CompareConfig, matched: Matched, seed: int) -> RunConfig:
    """The run of one candidate and seed."""
    tree = copy.deepcopy(matched.tree)
    tree["name"], tree["seed"] = f"{matched.name}-s{seed}", seed
    tree["runs_dir"] = str(Path(config.runs_dir) / config.name)
    tree["train"] = tree["train"] | {"num_threads": config.num_threads}
    tree["log"] = (tree.get("log") or {}) | {"progress": False, "report": False}
    return validate(RunConfig, tree)


def found_run(config: CompareConfig, matched: Matched, seed: int) -> Finished:
    """What is there of a run that is not to be trained now."""
    run = run_config(config, matched, seed)
    found = Finished(matched.name, seed, Path(run.runs_dir) / run.name, None)
    if is_done(run):
        return found
    ends = [str(record["reason"]) for record in found.records("end")]
    return replace(found, error=ends[-1] if ends and "Error" in ends[-1] else NOT_TRAINED)


def is_done(run: RunConfig) -> bool:
    """Whether a run has been evaluated at its end."""
    path = Path(run.runs_dir) / run.name / "metrics.jsonl"
    if not path.exists():
        return False
    return any(r["kind"] == "eval" and r["step"] >= run.train.total_steps for r in read_metrics(path))


def refuse_foreign(run: RunConfig) -> None:
    """UserError where the run's folder holds a run of another config."""
    path = Path(run.runs_dir) / run.name / "config.yaml"
    if not path.exists():
        return
    theirs, ours = (_what_counts(tree) for tree in (resolve(read_tree(path, "RunConfig")), run.to_dict()))
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"{path.parent} holds a run with another config (section {key} differs); remove it, or compare under "
                "another name"
            )


def _what_counts(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's config without what changes no result."""
    whole = validate(RunConfig, tree).to_dict()
    whole["train"] = {key: value for key, value in whole["train"].items() if key != "num_threads"}
    return {key: value for key, value in whole.items() if key not in ("name", "runs_dir", "log")}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """UserError while another comparison uses the folder. SIGTERM ends this one as Ctrl-C does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another comparison is at work in {folder}; wait for it, or use another name") from None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def train_all(config: CompareConfig, candidates: list[Matched], log: Callable[[str], None]) -> list[Finished]:
    """Train what is not trained yet, `jobs` at a time; a run that fails is reported and the others go on."""
    folder = Path(config.runs_dir) / config.name
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    # All seeds of a candidate come after all candidates of a seed, so that an early look sees every candidate.
    work = [(matched, seed) for seed in config.seeds for matched in candidates]
    stopped = threading.Event()
    children: set[subprocess.Popen[str]] = set()

    def one(matched: Matched, seed: int) -> Finished:
        run = run_config(config, matched, seed)
        done = Finished(matched.name, seed, Path(run.runs_dir) / run.name, None)
        if is_done(run) or stopped.is_set():
            return done
        path = folder / "configs" / f"{run.name}.yaml"
        dump_config(run, path)
        log(f"training {run.name}")
        environment = os.environ | {"OMP_NUM_THREADS": str(config.num_threads)}
        command = [sys.executable, str(TRAIN), str(path)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as child:
            children.add(child)
            assert child.stdout is not None
            lines = child.stdout.read().strip().splitlines()
            code = child.wait()
            children.discard(child)
        if code == 0 and is_done(run):
            return done
        reason = lines[-1] if lines else f"exit code {code}"
        log(f"{run.name} failed: {reason}")
        return Finished(matched.name, seed, done.folder, reason)

    pool = ThreadPoolExecutor(config.jobs)
    try:
        return list(pool.map(lambda item: one(*item), work))
    except BaseException:
        stopped.set()
        for child in list(children):
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
