"""launch/prepare.py as a user runs it: real kills, exit codes, the stdlib corpus, and a loader on the result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.data.config import DataConfig
from llm.data.loader import Loader
from llm.data.store import open_split
from llm.data.tokenizer import load_tokenizer
from tests.unit.data.helpers import hashes

ROOT = Path(__file__).resolve().parent.parent.parent


def write_config(folder: Path, **changes: Any) -> Path:
    """A config over 300 records and 200 files, some bad, in many small tasks."""
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    for i in range(200):
        (raw / f"{i:03d}.txt").write_bytes(b"\xff" if i % 40 == 7 else f"file {i}\n".encode() * (i * 20 + 1))
    rows = ["{" if i % 60 == 5 else json.dumps({"text": f"record {i} " * 30}) for i in range(300)]
    (folder / "r.jsonl").write_text("\n".join(rows))
    tree = {
        "sources": [{"type": "text", "paths": [str(raw)]}, {"type": "jsonl", "paths": [str(folder / "r.jsonl")]}],
        "tokenizer": {"kind": "bpe", "vocab_size": 400},
        "holdout": {"fraction": 0.1},
        "out": str(folder / "out"),
        "workers": 2,
        "task_bytes": 20_000,
        "part_bytes": 10_000,
    }
    path = folder / "prepare.yaml"
    path.write_text(json.dumps(tree | changes))
    return path


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), str(config), f"out={out}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=config.parent, start_new_session=True, stdout=pipe, stderr=pipe)


def kill_and_restart(folder: Path, kills: int) -> None:
    """Kill runs at random moments of their work, with their workers or without, then let one end."""
    config = write_config(folder)
    straight = start(config, folder / "straight")
    _, said = straight.communicate()
    assert straight.returncode == 0, said.decode()
    rng = random.Random(kills)
    parts = 0
    for _ in range(kills):
        parts += rng.randrange(1, 40)
        run = start(config, folder / "out")
        while run.poll() is None and len(list((folder / "out" / ".work").glob("*.json"))) < parts:
            time.sleep(0.005)
        time.sleep(rng.choice([0.0, 0.02, 0.1]))
        assert run.poll() is None, "ended before it could be killed"
        if rng.random() < 0.5:
            os.killpg(run.pid, signal.SIGKILL)
        else:
            run.kill()
        run.communicate()
    last = start(config, folder / "out")
    _, said = last.communicate()
    assert last.returncode == 0, said.decode()
    assert hashes(folder / "out") == hashes(folder / "straight")
    assert not (folder / "out" / ".work").exists()


def test_killed_and_started_again(tmp_path: Path) -> None:
    kill_and_restart(tmp_path, 2)


@pytest.mark.slow
def test_killed_many_times(tmp_path: Path) -> None:
    for trial in range(4):
        folder = tmp_path / str(trial)
        folder.mkdir()
        kill_and_restart(folder, 3 + trial)


def test_stdlib_to_batches(cli: Callable[..., Any], tmp_path: Path) -> None:
    """The quickstart's data with a small tokenizer: every held-out byte is scored once."""
    ran = cli(
        "prepare",
        ROOT / "configs" / "prepare" / "stdlib.yaml",
        f"out={tmp_path / 'out'}",
        "workers=1",
        "tokenizer.vocab_size=512",
        "tokenizer.sample_bytes=1M",
        "sources.0.exclude=[site-packages, dist-packages, __pycache__, test, idlelib, encodings, lib2to3, tests]",
    )
    assert ran.code == 0, ran.err
    assert "train" in ran.out and "valid" in ran.out
    out = tmp_path / "out"
    open_split(out, "train").verify()
    assert open_split(out, "train").n_tokens > 1_000_000
    loader = Loader(DataConfig(path=str(out), seq_len=256), split="valid", sequences_per_step=16, micro_batch_size=8)
    size = load_tokenizer(out).token_bytes()
    scored = sum(int(size[m.labels[m.labels >= 0].numpy()].sum()) for batch in loader for m in batch.microbatches)
    assert scored == (out / "valid.raw").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sources.0.paths=[absent.txt]"], "no text file at 'absent.txt'"),
        (["sources.0.typ=text"], "did you mean"),
        (["tokenizer.kind=bpee"], "bpe"),
        (["tokenizer.vocab_size=12"], "at least 257"),
        (["workers=-1"], "workers"),
        (["holdout.files=[nothing]"], "match none of"),
        (["holdout.by=position"], "fraction"),
        (["tokenizer.kind=hf", "tokenizer.path=absent/x/y", "tokenizer.vocab_size=null"], "absent/x/y"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    cli: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    config = tmp_path / "c.yaml"
    tree = {"sources": [{"type": "text", "paths": [str(tmp_path)]}], "out": str(tmp_path / "out"), "workers": 1}
    config.write_text(json.dumps(tree | {"tokenizer": {"kind": "bpe", "vocab_size": 300}}))
    ran = cli("prepare", config, *arguments)
    assert ran.code == 2, ran.out
    assert message in ran.err and "Traceback" not in ran.err


def test_every_config_is_valid() -> None:
    from llm.config.load import load_config
    from llm.data.prepare.config import PrepareConfig

    for path in sorted((ROOT / "configs" / "prepare").glob("*.yaml")):
        load_config(PrepareConfig, [str(path)])
