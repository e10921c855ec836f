"""The whole way as commands: prepare, check, train, resume, evaluate, generate, export, and transformers at its end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import cli as program
from tests.conftest import ROOT, Ran
from tests.e2e.tiny import prepare_tree, run_tree, write_corpus, write_yaml

RELOAD = """
import json, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("llm", "launch", "evals", "vision"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import llm
except ImportError:
    pass
else:
    raise SystemExit("this process must not see the project")
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
start = torch.tensor([[model.config.bos_token_id]])
out = model.generate(torch.cat([start, ids], dim=1), do_sample=False, max_new_tokens=16, pad_token_id=0)
new = out[0, ids.shape[1] + 1 :]
print(json.dumps({"class": type(model).__name__, "text": tokenizer.decode(new, skip_special_tokens=True)}))
"""


def command(*arguments: object) -> Ran:
    """A command within this process, outside of pytest's capturing."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    code = ended.value.code
    ran = Ran(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All commands, run once: what each printed, and where things lie."""
    root = tmp_path_factory.mktemp("pipeline")
    place = SimpleNamespace(root=root, data=root / "data", run=root / "runs" / "tiny", export=root / "hf")
    corpus = write_corpus(root / "text")
    tree = prepare_tree(corpus, place.data) | {"tokenizer": {"kind": "bpe", "vocab_size": 270}}
    place.config = write_yaml(root / "run.yaml", run_tree(place.data, root / "runs") | {"log": {"progress": False}})
    place.prepare = command("prepare", write_yaml(root / "prepare.yaml", tree))
    place.check = command("train", place.config, "--check")
    place.checked_only = not place.run.exists()
    place.train = command("train", place.config)
    place.after_train = records(place.run)
    place.resume = command("train", place.config, "train.steps=7")
    place.evaluate = command("evaluate", place.run, "--compressors")
    place.generate = command(
        "generate", place.run, "--prompt", "The quick", "temperature=0", "max_new_tokens=16", "jsonl=true"
    )
    place.exported = command("export", place.run, place.export)
    return place


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_prepare(done: Any) -> None:
    manifest = json.loads((done.data / "manifest.json").read_text())
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["valid"]["documents"] == 12
    assert "270 tokens" in done.prepare.out


def test_check_trains_and_leaves_nothing(done: Any) -> None:
    assert done.checked_only
    for word in ("config", "model", "data", "runs folder", "dry step"):
        assert f"{word} " in done.check.out
    assert "loss 5." in done.check.out


def test_train_writes_what_it_promises(done: Any) -> None:
    names = {path.name for path in done.run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "report.html", "loss.png"} <= names
    page = (done.run / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and 'href="http' not in page, "the page needs no network"
    kinds = [record["kind"] for record in done.after_train]
    assert kinds[0] == "start" and kinds[-1] == "end"
    assert kinds.count("train") == 4 and kinds.count("eval") == 1
    losses = [record["loss"] for record in done.after_train if record["kind"] == "train"]
    assert losses[-1] < losses[0] < 6


def test_resume_goes_on(done: Any) -> None:
    assert "resumed at step 4" in done.resume.err
    now = records(done.run)
    assert [record["step"] for record in now if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert [r for r in now if r["kind"] == "train"][:4] == [r for r in done.after_train if r["kind"] == "train"]


def test_evaluate_agrees_with_the_training_loop(done: Any) -> None:
    """The loop scores packed rows cut at 32 tokens, the command whole documents: near, and the command not worse."""
    result = json.loads(done.evaluate.out)
    assert result == json.loads((done.run / "evaluate.json").read_text())
    assert set(result["compressors"]) == {"gzip -9", "bz2 -9", "xz -9"}
    loop = [record for record in records(done.run) if record["kind"] == "eval"][-1]
    assert result["loss"] == pytest.approx(loop["loss"], rel=0.1)
    assert result["bits_per_byte"] == pytest.approx(loop["bits_per_byte"], rel=0.1)


def test_generate(done: Any) -> None:
    result = json.loads(done.generate.out)
    assert result["prompt"] == "The quick" and result["finish"] in ("length", "eos")
    assert (
        command("generate", done.run, "--prompt", "The quick", "temperature=0", "max_new_tokens=16", "jsonl=true").out
        == done.generate.out
    )


def test_transformers_reads_the_export_without_us(done: Any) -> None:
    """A process that cannot import this project continues a prompt greedily with the same text."""
    parity = json.loads(done.exported.out)
    assert parity["export"] == str(done.export)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", RELOAD, str(done.export), "The quick"],
        cwd=done.root,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result == {"class": "LlamaForCausalLM", "text": json.loads(done.generate.out)["text"]}


def test_an_export_comes_back(done: Any) -> None:
    command("export", "import", done.export, done.root / "back")
    again = command(
        "generate", done.root / "back", "--prompt", "The quick", "temperature=0", "max_new_tokens=16", "jsonl=true"
    )
    assert json.loads(again.out) == json.loads(done.generate.out)


def test_estimate_needs_no_data(done: Any) -> None:
    found = json.loads(command("estimate", done.config, "model.vocab_size=270", "--json").out)
    start = done.after_train[0]
    assert found["parameters"] == start["parameters"]


def test_the_quickstart_config_fits_any_prepared_data(done: Any) -> None:
    """`--check` on the shape of the quickstart, one short batch of it."""
    config = ROOT / "configs" / "run" / "quickstart.yaml"
    changes = [
        "train.batch_tokens=1024",
        "train.micro_batch_size=2",
        f"runs_dir={done.root / 'q'}",
        "train.num_threads=1",
    ]
    ran = command("train", config, f"data.path={done.data}", *changes, "--check")
    assert "dry step    ok" in ran.out and "model       ok: 3,2" in ran.out
    assert not (done.root / "q" / "quickstart").exists()


@pytest.mark.slow
def test_the_same_in_processes_of_their_own(done: Any, tmp_path: Path, run_cli: Any) -> None:
    """As a user runs it: each command a process, the losses the same to the bit."""
    ran = run_cli("train", done.config, f"runs_dir={tmp_path}", OMP_NUM_THREADS="1")
    assert ran.code == 0, ran.err
    mine = [record["loss"] for record in records(tmp_path / "tiny") if record["kind"] == "train"]
    assert mine == [record["loss"] for record in done.after_train if record["kind"] == "train"]
    for arguments in (
        ["evaluate", tmp_path / "tiny"],
        ["generate", tmp_path / "tiny", "--prompt", "a"],
        ["export", tmp_path / "tiny", tmp_path / "hf"],
    ):
        ran = run_cli(*arguments)
        assert ran.code == 0, ran.err
