"""Whole trainers as the command builds them: exact resume, evaluation, signals, also with two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm.checkpoint import load_meta
from llm.core.batch import IGNORE
from llm.core.errors import UserError
from llm.data.prepare.config import PrepareConfig
from llm.data.prepare.run import prepare
from llm.data.store import open_split
from llm.train.config import RunConfig
from llm.train.setup import build_trainer, make_loader
from llm.train.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.e2e.tiny import prepare_tree, run_tree, write_corpus, write_yaml
from tests.unit.train.trainer_parts import equal, weights

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of prepared data."""
    root = tmp_path_factory.mktemp("trainer")
    tree = prepare_tree(write_corpus(root / "text"), root / "data")
    prepare(PrepareConfig.model_validate(tree), quiet=True)
    return root / "data"


def real(data: Path, runs: Path, **changes: Any) -> Trainer:
    """A whole trainer as the command builds it."""
    tree = run_tree(data, runs)
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return build_trainer(RunConfig.model_validate(tree))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "optimizer", [{"lr": 0.01}, {"type": "muon", "lr": 0.02, "adam_lr": 0.003}], ids=["adamw", "muon"]
)
def test_resume_is_exact(data: Path, tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """7 steps straight == 4, a new trainer, 3: losses, weights, optimizer, random numbers and position, to the bit."""
    changes = {
        "model": {"dropout": 0.2},
        "optim": optimizer,
        "schedule": {"warmup_tokens": 256},
        "checkpoint": {"every_steps": 3},
    }
    straight = real(data, tmp_path / "a", train={"steps": 7}, **changes)
    straight.fit()
    stopped = real(data, tmp_path / "b", train={"steps": 7}, **changes)
    stopped.parts.callbacks[0].on_step = lambda trainer, out: out.step == 3 and trainer.request_stop("pause")  # type: ignore[assignment, func-returns-value]
    assert stopped.fit().step == 4
    torch.manual_seed(999)
    resumed = real(data, tmp_path / "b", train={"steps": 7}, **changes)
    resumed.fit()
    assert resumed.resumed_from is not None and resumed.resumed_from.name == "step-000000004"
    a, b = (
        [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in metrics(t.run_dir) if r["kind"] == "train"]
        for t in (straight, resumed)
    )
    assert a == b and [record[0] for record in a] == list(range(1, 8))
    assert equal(weights(straight), weights(resumed))
    left, right = straight.strategy.state().optim, resumed.strategy.state().optim
    assert all(equal(left[name], right[name]) for name in left)
    assert straight.loader.state() == resumed.loader.state()
    assert straight.last_eval == resumed.last_eval and straight.last_eval is not None


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_every_held_out_token_is_scored_once(data: Path, tmp_path: Path, world_size: int, packing: str) -> None:
    run = RunConfig.model_validate(run_tree(data, tmp_path)).model_copy(deep=True)
    run = run.replace(data=run.data.replace(packing=packing), train=run.train.replace(micro_batch_size=3))
    labels = []
    for rank in range(world_size):
        place: Any = SimpleNamespace(rank=rank, world_size=world_size)
        labels += [m.labels.flatten() for batch in make_loader(run, place, split="valid") for m in batch.microbatches]
    scored = torch.cat(labels)
    store = open_split(data, "valid")
    expected = torch.from_numpy(store.tokens.astype("int64"))
    assert torch.equal(scored[scored != IGNORE].sort().values, expected.sort().values)


def test_weights_of_another_run_start_a_new_one(data: Path, tmp_path: Path) -> None:
    first = real(data, tmp_path)
    first.fit()
    second = real(data, tmp_path / "new", checkpoint={"init_from": str(first.run_dir)})
    second._resume()
    assert equal(weights(second), weights(first)) and (second.step, second.tokens) == (0, 0)
    assert all(not bool(slot.any()) for state in second.strategy.state().optim.values() for slot in state.values())


def test_a_failed_start_leaves_the_config_of_the_run(data: Path, tmp_path: Path) -> None:
    trainer = real(data, tmp_path)
    trainer.fit()
    written = (trainer.run_dir / "config.yaml").read_text()
    with pytest.raises(UserError, match="does not fit this run"):
        real(data, tmp_path, model={"d_model": 32}).fit()
    assert (trainer.run_dir / "config.yaml").read_text() == written


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_process_that_is_told_to_stop_saves_and_ends_with_75(data: Path, tmp_path: Path, number: int) -> None:
    tree = run_tree(data, tmp_path)
    tree["train"]["steps"] = 1_000_000
    config = write_yaml(tmp_path / "run.yaml", tree)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), str(config), "checkpoint.every_steps=null"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step") and " 3/" in line:
            os.kill(process.pid, number)
            break
    try:
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, rest
    assert f"{signal.Signals(number).name}: saving after this step" in rest
    (folder,) = (tmp_path / "tiny" / "checkpoints").glob("step-*")
    records = metrics(tmp_path / "tiny")
    trained = [record["step"] for record in records if record["kind"] == "train"]
    assert trained == list(range(1, trained[-1] + 1)) and load_meta(folder)["step"] == trained[-1]
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "preempt"
    assert time.time() - records[-1]["time"] < 60 and records[-1]["kind"] == "end"


def two_ranks(rank: int, data: Path, runs: Path, asks: int | None) -> dict[str, Any]:
    """For `run_ranks`: a DDP run of four steps; rank 1 is told to stop in step `asks`, or never."""
    trainer = real(data, runs, parallel={"strategy": "ddp"}, eval={"batches": None})
    if rank == 1 and asks is not None:
        trainer.parts.signal_requested = lambda: trainer.step >= asks - 1
    result = trainer.fit()
    return {"step": result.step, "reason": result.reason, "eval": result.last_eval, "weights": weights(trainer)}


@pytest.mark.distributed
def test_two_processes_evaluate_as_one_and_stop_together(data: Path, tmp_path: Path) -> None:
    alone = real(data, tmp_path / "one", eval={"batches": None})
    single = alone.fit()
    both = run_ranks(two_ranks, 2, data, tmp_path / "two", None)
    assert both[0]["eval"] == both[1]["eval"] and single.last_eval is not None
    for name, value in single.last_eval.items():
        assert both[0]["eval"][name] == pytest.approx(value, rel=1e-5), name
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(both[1]["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    told = run_ranks(two_ranks, 2, data, tmp_path / "told", 3)
    assert [(result["step"], result["reason"]) for result in told] == [(3, "signal")] * 2
    again = run_ranks(two_ranks, 2, data, tmp_path / "told", None)
    assert all(equal(again[0]["weights"], result["weights"]) for result in (again[1], both[0]))
