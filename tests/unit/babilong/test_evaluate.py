"""`evaluate babilong`: what it writes, that it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from evals.babilong import run as running
from evals.babilong.forms import FinetunedForm, PromptForm
from evals.babilong.sampler import Hidden
from evals.records import wilson_interval
from llm.generate.events import Completion
from llm.generate.prefill import PromptStream
from tests.unit.babilong.test_sampler import prose
from tests.unit.generate.runs import MODEL, write_run

Cli = Callable[..., Any]
BACKGROUND = "background.source.type=text"


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("books")
    (folder / "a.txt").write_text(prose(300))
    return f"background.source.paths=[{folder}]"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda r: (r["task"], r["length"], r["window"], r["index"]))


def test_a_run_is_evaluated_and_killed_ones_go_on(cli: Cli, run_folder: Path, books: str, tmp_path: Path) -> None:
    common = ["evaluate", "babilong", f"run={run_folder}", "tasks=[qa2,qa1]", "samples=5", BACKGROUND, books]
    done = cli(*common, "lengths=[0k,1k]", f"out={tmp_path / 'a'}", "batch=2", "chunk=64")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["tasks"] == ["qa1", "qa2"] and summary["lengths"] == [0, 1000] and summary["n_samples"] == 20
    found = summary["cells"]["right"]["qa1"]["1000"]
    assert found["n"] == 5 and (found["low"], found["high"]) == wilson_interval(found["right"], 5)
    rows = rows_of(tmp_path / "a")
    assert {row["n_context"] for row in rows if row["length"]} == {700}
    assert all(row["n_read"] > row["n_context"] == row["n_bytes"] for row in rows), "a token is a byte here"
    for name in ("conditions.json", "summary.json", "table.md", "report.html", "heatmap.png", "depth-qa1.png"):
        assert (tmp_path / "a" / name).stat().st_size > 0, name
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<svg" in page and "own prompts" in page and "http" not in page.replace("http-equiv", "")
    assert "| qa2 | 16.7 |" in (tmp_path / "a" / "table.md").read_text()

    first = cli(*common, "lengths=0", f"out={tmp_path / 'b'}", "batch=3")
    assert first.code == 0, first.err
    file = tmp_path / "b" / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    again = cli(*common, "lengths=[0k,1k]", f"out={tmp_path / 'b'}", "batch=5", "chunk=1000")
    assert again.code == 0, again.err
    assert rows_of(tmp_path / "b") == rows, "batches, chunks and a kill make no difference"

    before = file.read_bytes()
    for other in ("seed=1", "form=finetuned", "prompts.examples=false", "background.min_tokens=12", "windows=2"):
        refused = cli(*common, "lengths=[0k,1k]", f"out={tmp_path / 'b'}", other)
        assert refused.code == 2 and "holds results of other conditions" in refused.err, (other, refused.err)
    assert file.read_bytes() == before


@pytest.mark.parametrize("form", ["prompt", "finetuned"])
def test_an_oracle_is_always_right(
    form: str, cli: Cli, run_folder: Path, books: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[int, str] = {}
    kept: list[PromptStream] = []

    class Oracle:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def generate(self, prompts: list[PromptStream], _: Any) -> list[Completion]:
            return [Completion(list(answers[id(p)].encode()), "eos") for p in prompts]

    for kind in (PromptForm, FinetunedForm):

        def stream(self: Any, hidden: Hidden, original: Any = kind.stream) -> PromptStream:
            made = original(self, hidden)
            kept.append(made)
            answers[id(made)] = hidden.sample.answer
            return made

        monkeypatch.setattr(kind, "stream", stream)
    monkeypatch.setattr(running, "Engine", Oracle)
    tasks = [f"qa{n}" for n in range(1, 21)]
    words = [f"tasks={tasks}", "lengths=[0k,2k]", "samples=2", f"form={form}", BACKGROUND, books, f"out={tmp_path}"]
    done = cli("evaluate", "babilong", f"run={run_folder}", *words)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    best = "right_fixed" if form == "prompt" else "right"
    assert all(cell["share"] == 1 for cells in summary["cells"][best].values() for cell in cells.values())
    assert summary["mean_qa1_5"][best]["2000"]["share"] == 1
    assert "100.0 (34-100)" in (tmp_path / "table.md").read_text()


def test_windows_put_the_facts_where_they_say(cli: Cli, run_folder: Path, books: str, tmp_path: Path) -> None:
    words = ["tasks=qa1", "lengths=3k", "samples=2", "windows=5", BACKGROUND, books, f"out={tmp_path}"]
    done = cli("evaluate", "babilong", f"run={run_folder}", *words, "form=finetuned")
    assert done.code == 0, done.err
    for row in rows_of(tmp_path):
        low, high = row["window"] / 5, (row["window"] + 1) / 5
        assert low - 0.15 <= row["depths"][0] <= high + 0.1
    fifths = json.loads(done.out)["depths"]["qa1"]["3000"]
    assert sum(cell["n"] for cell in fifths.values()) == 10 and len(fifths) >= 4
    assert "facts in (0.8, 1.0)" in done.err


def test_a_recurrent_memory_reads_what_is_longer_than_its_training(cli: Cli, books: str, tmp_path: Path) -> None:
    wrapped = {**MODEL, "wrappers": [{"type": "armt", "segment": 32, "n_memory": 2, "d_memory": 4}]}
    folder = write_run(tmp_path / "armt", model=wrapped)
    words = ["tasks=qa1", "lengths=2k", "samples=2", "form=finetuned", BACKGROUND, books]
    ones = [
        cli("evaluate", "babilong", f"run={folder}", *words, f"chunk={c}", f"out={tmp_path / str(c)}")
        for c in (48, 500)
    ]
    assert [done.code for done in ones] == [0, 0], ones[0].err
    assert rows_of(tmp_path / "48") == rows_of(tmp_path / "500")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["tasks=qa21"], "unknown task 'qa21'"),
        (["lengths=300"], "leaves nothing beside reserve=300"),
        (["form=finetuned", "prompts.examples=false"], "no effect with form=finetuned"),
        (["run=nowhere"], "no such run"),
        (["background.source.type=text", "background.source.paths=[nowhere.txt]"], "no text file"),
        (["facts=nowhere", "lengths=0"], "no file qa1_"),
    ],
)
def test_mistakes_are_named(words: list[str], what: str, cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    given = ["tasks=qa1", "lengths=1k", f"run={run_folder}", f"out={tmp_path}", *words]
    done = cli("evaluate", "babilong", *given)
    assert done.code == 2 and what in done.err, done.err


def test_nothing_is_cut_off(cli: Cli, tmp_path: Path, books: str) -> None:
    folder = write_run(tmp_path / "learned", model={**MODEL, "position": "learned"})
    done = cli("evaluate", "babilong", f"run={folder}", "lengths=1k", "tasks=qa1", BACKGROUND, books)
    assert done.code == 2 and "position table has 48" in done.err


def test_without_a_run_folder_out_is_asked_for(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    done = cli("evaluate", "babilong", f"run={tmp_path / 'alone'}", "lengths=0")
    assert done.code == 2 and "out=" in done.err


def test_a_random_guesser_lies_within_its_interval() -> None:
    """95% intervals hold the truth about 95 times in 100."""
    rng, held = Random(0), 0
    for _ in range(400):
        right = sum(rng.random() < 1 / 6 for _ in range(100))
        low, high = wilson_interval(right, 100)
        held += low <= 1 / 6 <= high
    assert 0.91 < held / 400 < 0.985
