"""Our models under lm-eval: the numbers of its own hf model, truncation counted, mistakes told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from evals.harness.local_tasks import TASKS, write_tasks
from llm.core.errors import UserError
from tests.unit.generate.runs import MODEL, write_run

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over bytes, 120 of them at most."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", model={**MODEL, "max_seq_len": 120})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), n=4, text_chars=200)


@pytest.fixture
def lm(run_folder: Path) -> Any:
    from evals.harness.model import ManyformerLM

    return ManyformerLM(str(run_folder), device="cpu", max_length=48)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_the_numbers_of_the_hf_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from evals.harness.compare_with_hf import CompareOptions, compare

    options = CompareOptions(d_model=32, n_layers=2, n_heads=4, vocab_size=300, max_seq_len=128, n=6, text_chars=500)
    found = compare(options, tmp_path)
    theirs, ours = found["scores"]["hf"], found["scores"]["ours"]
    assert set(theirs) == set(ours) and {name.split()[0] for name in theirs} == set(TASKS)
    for name, value in theirs.items():
        assert math.isfinite(value) and ours[name] == pytest.approx(value, rel=1e-5), name
    assert found["logprob_difference"] < 1e-5
    assert found["equal_outputs"] == [6, 6]


def test_the_command(cli: Cli, run_folder: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [f"run={run_folder}", f"tasks=[{','.join(TASKS)}]", f"include_path={tasks}", "offline=true"]
    done = cli("evaluate", "harness", *words, "limit=3", f"out={out}", "device=cpu")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result["results"]["stdlib_text"]["bits_per_byte,none"] > 0
    assert result["truncated"]["loglikelihood"] > 0 and result["truncated"]["tokens"] > 0
    assert "lost" in done.err and "stdlib_next_line" in done.err
    assert json.loads((out / "results.json").read_text()) == result
    rows = [json.loads(line) for line in (out / "samples-stdlib_rest_of_line.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(isinstance(row["resps"][0][0], str) for row in rows)


@pytest.mark.slow
def test_lm_evals_own_command_finds_the_model(
    run_folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from evals.harness.__main__ import main

    words = ["--model", "manyformer", "--model_args", f"checkpoint={run_folder},batch_tokens=512"]
    words += ["--tasks", "stdlib_next_line", "--include_path", str(tasks), "--limit", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *words])
    assert main() == 0
    assert "stdlib_next_line" in capfd.readouterr().out


def test_what_is_too_long_is_counted(lm: Any) -> None:
    lm.loglikelihood(instances("loglikelihood", ("a" * 60, "bc"), ("a" * 20, "bc")), disable_tqdm=True)
    assert lm.n_truncated == {"loglikelihood": 1, "generate_until": 0} and lm.n_truncated_tokens == 62 - 49
    asked = instances("generate_until", ("a" * 60, {"until": ["x"], "max_gen_toks": 8}))
    lm.generate_until(asked, disable_tqdm=True)
    assert lm.n_truncated["generate_until"] == 1 and lm.n_truncated_tokens == 13 + 60 - 40
    assert lm.get_model_info()["n_truncated_tokens"] == lm.n_truncated_tokens


def test_a_rolling_text_is_its_loss(lm: Any) -> None:
    from evals.perplexity import evaluate_documents
    from evals.text import _document

    text = "hello world"
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    tokens = lm.tok_encode(text)
    ((pair, _),) = lm.loglikelihood(instances("loglikelihood", ("", text)), disable_tqdm=True)
    assert found == [pytest.approx(pair, abs=1e-4)]
    whole = evaluate_documents(lm.model, [_document(text, len(text), lm.tokenizer)], lm.tokenizer.start_id)
    end = lm.scorer([([lm.tokenizer.start_id, *tokens], [lm.tokenizer.eos_id])])[0].logprob
    assert found[0] + end == pytest.approx(-whole.loss * whole.n_tokens, abs=1e-4)


def test_sampling_is_repeatable_and_stops_are_cut(lm: Any) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20, "until": []}
    first = lm.generate_until(instances("generate_until", ("ab", settings), ("ab", settings)), disable_tqdm=True)
    again = lm.generate_until(instances("generate_until", ("ab", settings), ("ab", settings)), disable_tqdm=True)
    assert first == again and first[0] != first[1]
    stop = next(letter for letter in first[0][2:] if letter.isascii())
    (cut,) = lm.generate_until(instances("generate_until", ("ab", {**settings, "until": [stop]})), disable_tqdm=True)
    assert cut == first[0].split(stop)[0]


def test_mistakes(cli: Cli, lm: Any, run_folder: Path, tasks: Path) -> None:
    for words, message in (
        (["tasks=stdlib_text", "include_path=nowhere"], "no folder"),
        (["tasks=stdlib_text", f"include_path={tasks}", "max_length=1"], "max_length"),
        (["tasks=stdlib_text", "batch=3"], "batch"),
    ):
        done = cli("evaluate", "harness", f"run={run_folder}", *words)
        assert done.code == 2 and message in done.err, done.err
    with pytest.raises(UserError, match="leaves no room"):
        lm.generate_until(instances("generate_until", ("a", {"until": []})), disable_tqdm=True)
    with pytest.raises(UserError, match="'num_beams' is not known"):
        lm.generate_until(instances("generate_until", ("a", {"num_beams": 2})), disable_tqdm=True)
    with pytest.raises(UserError, match="no chat template"):
        lm.chat_template(True)
    with pytest.raises(UserError, match="continuation has 60 tokens"):
        lm.loglikelihood(instances("loglikelihood", ("a", "b" * 60)), disable_tqdm=True)


@pytest.mark.slow
def test_a_task_that_is_not_there(cli: Cli, run_folder: Path, tasks: Path) -> None:
    done = cli("evaluate", "harness", f"run={run_folder}", f"include_path={tasks}", "tasks=[stdlib_text,no_such_task]")
    assert done.code == 2 and "no task 'no_such_task'" in done.err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_numbers_of_one(cli: Cli, run_folder: Path, tasks: Path, tmp_path: Path) -> None:
    words = [f"run={run_folder}", f"tasks=[{','.join(TASKS)}]", f"include_path={tasks}", "device=cpu", "limit=3"]
    one = cli("evaluate", "harness", *words, f"out={tmp_path / 'one'}")
    assert one.code == 0, one.err
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(root / "launch" / "evaluate.py"), "harness", *words, f"out={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=root, env={**os.environ}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert second["world_size"] == 2
    for task, scores in first["results"].items():
        for name, value in scores.items():
            if isinstance(value, float):
                assert second["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
