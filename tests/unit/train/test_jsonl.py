"""metrics.jsonl: exact, strict, one line per step whatever happens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.core.errors import UserError
from llm.train.callbacks.jsonl import JsonlWriter, encode, read_metrics
from tests.unit.train.helpers import do_step, stand_in


def written(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path / "small" / "metrics.jsonl")


def train_steps(path: Path) -> list[int]:
    return [record["step"] for record in written(path) if record["kind"] == "train"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip_exactly(value: float) -> None:
    assert json.loads(encode({"x": value}))["x"] == value


def test_lines_are_strict_json_also_for_values_that_are_not_finite(tmp_path: Path) -> None:
    line = encode({"kind": "train", "loss": math.nan, "grad_norm": math.inf, "metrics": [-math.inf]})
    json.loads(line, parse_constant=pytest.fail)
    (tmp_path / "m").write_text(line + "\n")
    (record,) = read_metrics(tmp_path / "m")
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf


def test_each_kind_is_written(tmp_path: Path) -> None:
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    writer.on_start(trainer)
    do_step(trainer, [writer], 1, metrics={"tokens_per_second": 256.0})
    do_step(trainer, [writer], 2, judged=(math.nan, 2.0), skipped=True)
    writer.on_eval(trainer, {"step": 2, "tokens": 256, "loss": 1.5, "perplexity": math.exp(1.5), "num_tokens": 99})
    writer.on_saved(trainer, SimpleNamespace(step=2, tokens=256, path=tmp_path / "step-2", kind="regular"))
    writer.write("sample", trainer, prompt="a", text="b")
    writer.on_end(trainer)
    records = written(tmp_path)
    assert [r["kind"] for r in records] == ["start", "train", "anomaly", "train", "eval", "checkpoint", "sample", "end"]
    assert {"versions", "hardware", "git_revision", "config_hash", "parameters"} <= set(records[0])
    first = records[1]
    assert (first["step"], first["tokens"], first["loss"], first["lr"]) == (1, 128, 2.0, 1e-3 / 3)
    assert first["tokens_per_second"] == 256.0
    assert records[2] | {"time": 0} == {
        "kind": "anomaly", "step": 2, "tokens": 256, "time": 0, "action": "skip", "reason": "loss is nan",
        "loss": pytest.approx(math.nan, nan_ok=True), "grad_norm": 2.0,
    }  # fmt: skip
    assert records[3]["skipped"] is True
    assert records[-1]["reason"] == "stopped"


def test_resume_drops_what_comes_after_and_half_a_line(tmp_path: Path) -> None:
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    writer.on_start(trainer)
    for step in range(1, 8):
        do_step(trainer, [writer], step)
    with open(tmp_path / "small" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "lo')
    before = (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()[:6]
    resumed, again = stand_in(tmp_path, step=5), JsonlWriter()
    again.on_start(resumed)
    assert train_steps(tmp_path) == [1, 2, 3, 4, 5]
    assert (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()[:6] == before, "kept lines are untouched"
    for step in range(6, 11):
        do_step(resumed, [again], step)
    again.on_end(resumed)
    assert train_steps(tmp_path) == list(range(1, 11))
    assert [r["step"] for r in written(tmp_path) if r["kind"] == "start"] == [0, 5]
    assert written(tmp_path)[-1]["reason"] == "done"


def test_a_fresh_start_begins_anew(tmp_path: Path) -> None:
    for _ in range(2):
        trainer, writer = stand_in(tmp_path), JsonlWriter()
        writer.on_start(trainer)
        do_step(trainer, [writer], 1)
        writer.close()
    assert [r["kind"] for r in written(tmp_path)] == ["start", "train"]


def test_rollback_keeps_one_line_per_step_and_the_anomaly(tmp_path: Path) -> None:
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    writer.on_start(trainer)
    for step in range(1, 6):
        do_step(trainer, [writer], step)
    writer.before_optim(trainer, None)  # type: ignore[arg-type]
    trainer.anomaly.judge(math.inf, 1.0)
    trainer.step = 2
    for step in range(3, 8):
        do_step(trainer, [writer], step)
    writer.close()
    assert train_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    (anomaly,) = [r for r in written(tmp_path) if r["kind"] == "anomaly"]
    assert anomaly["step"] == 6


def test_errors_are_recorded(tmp_path: Path) -> None:
    trainer, writer = stand_in(tmp_path), JsonlWriter()
    writer.on_start(trainer)
    writer.on_error(trainer, ValueError("boom"))
    assert written(tmp_path)[-1]["reason"] == "ValueError: boom"
    writer.on_end(trainer)
    assert len(written(tmp_path)) == 2, "nothing is written after the end"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    trainer, writer = stand_in(tmp_path, rank=1), JsonlWriter()
    writer.on_start(trainer)
    do_step(trainer, [writer], 1)
    writer.on_end(trainer)
    assert not (tmp_path / "small").exists()


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "none")
    (tmp_path / "m").write_text('{"kind": "start"}\nrubbish\n{"kind": "end"}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_metrics(tmp_path / "m")
    (tmp_path / "m").write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is not a record"):
        read_metrics(tmp_path / "m")
