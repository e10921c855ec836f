"""Resume is exact: a run that was killed again and again ends like one that was not. The whole matrix, with real
processes: `python evals/resume_matrix.py`."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import evals.resume_matrix as matrix
from evals.resume_matrix import Kill
from llm.checkpoint.faults import VARIABLE


class Forked:
    """A command in a forked process, which spares it the imports; stands for subprocess.Popen."""

    def __init__(self, script: str, arguments: list[str], log: Path, fault: str) -> None:
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_run, args=(script, arguments, log, fault))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def _run(script: str, arguments: list[str], log: Path, fault: str) -> None:
    from launch import prepare, train

    os.environ[VARIABLE] = fault
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit({"train.py": train.main, "prepare.py": prepare.main}[script](arguments))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(work folder, config) with a finished run `straight`; commands are forked."""
    import launch.prepare
    import launch.train  # noqa: F401
    import llm.train.setup  # noqa: F401  (what the children would otherwise import each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            matrix, "start", lambda script, args, log, fault="", processes=1: Forked(script, args, log, fault)
        )
        work = tmp_path_factory.mktemp("resume")
        matrix.prepare(work)
        config = matrix.write_config(work)
        matrix.finish("train.py", [str(config)], work / "output.log")
        yield work, config


def _kill_and_compare(straight: tuple[Path, Path], name: str, kills: list[Kill]) -> list[int]:
    work, config = straight
    log, run, rng = work / "output.log", work / "runs" / name, random.Random(0)
    arguments = [str(config), f"name={name}"]
    for kill in kills:
        assert matrix.train_and_kill(arguments, kill, run, log, rng), f"done before {kill}: {log.read_text()[-2000:]}"
        assert matrix.lost(run) == []
    matrix.finish("train.py", arguments, log)
    assert matrix.compare(run, work / "runs" / "straight") == []
    return [record["step"] for record in matrix.records(run, "start")]


def test_killed_between_steps_and_while_saving(straight: tuple[Path, Path]) -> None:
    starts = _kill_and_compare(straight, "twice", [Kill("step", 23), Kill("save", 41)])
    assert len(starts) == 3 and starts[1] >= 15 and starts[2] >= 30, starts


def test_killed_inside_a_save(straight: tuple[Path, Path]) -> None:
    _kill_and_compare(straight, "inside", [Kill("tensors-half-written"), Kill("renamed")])


def test_a_difference_is_seen(straight: tuple[Path, Path]) -> None:
    """The comparison itself: another seed gives other losses."""
    work, config = straight
    matrix.finish("train.py", [str(config), "name=other", "seed=1"], work / "output.log")
    problems = matrix.compare(work / "runs" / "other", work / "runs" / "straight")
    assert "train record of step 1 differs in loss" in problems[0] and "tensors differ" in problems[-1]


def test_data_order_at_other_world_sizes(straight: tuple[Path, Path]) -> None:
    row = matrix.data_order(straight[0] / "data")
    assert row.problems == [] and row.resumed_at == [0, 20, 40]


@pytest.mark.slow
def test_the_matrix_of_kills(tmp_path: Path) -> None:
    matrix.prepare(tmp_path)
    rows = list(matrix.kill_matrix(tmp_path, 20, seed=1))
    assert sum(len(row.kills) for row in rows) >= 18
    assert {row.name: row.problems for row in rows if row.problems} == {}


@pytest.mark.slow
@pytest.mark.distributed
def test_other_world_sizes(tmp_path: Path) -> None:
    matrix.prepare(tmp_path)
    rows = list(matrix.world_matrix(tmp_path))
    assert {row.name: row.problems for row in rows if row.problems} == {}
