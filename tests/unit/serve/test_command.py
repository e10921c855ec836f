"""launch/serve.py: what it refuses, and its life as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from tests.unit.generate.runs import write_run

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


MISTAKES = [
    (["host=0.0.0.0"], "host=0.0.0.0 can be reached from other machines, and there is no API key"),
    (['host="::"'], "can be reached from other machines"),
    (["max_wating=3"], "did you mean 'max_waiting'?"),
    (["port=99999"], "port"),
    (["stray"], "unexpected argument 'stray'"),
    (["--api-key", "x"], "unexpected argument '--api-key'"),
    (["--api-key-file", "/nonexistent"], "cannot read the API key in /nonexistent"),
    (["host=127.0.0.1", "port=0", "--chat-template", "/nonexistent"], "cannot read the chat template /nonexistent"),
    (["port=0", "slice=1/4"], "slice is for nested models"),
    (["port=0", "request_timeout=0"], "request_timeout"),
    (["port=0", "--draft-tokens", "3"], "--draft-tokens has no effect without --speculate"),
    (["port=0", "--speculate", "loops:1"], "loops:1 is for a looped model"),
    (["port=0", "--speculate", "guess"], "cannot draft with 'guess'"),
    (["port=0", "prefix_cache=1M", "cache=contiguous"], "cache=contiguous has not"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes(
    cli: Cli, run_folder: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MANYFORMER_API_KEY", raising=False)
    done = cli("serve", run_folder, *arguments)
    assert done.code == 2, done.err
    assert message in done.err and done.err.count("\n") == 1


def test_a_missing_library_is_told(cli: Cli, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = cli("serve", run_folder)
    assert done.code == 2 and "pip install 'manyformer[serve]'" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_a_process(run_folder: Path, repo_root: Path, number: signal.Signals) -> None:
    template = run_folder / "own.jinja"
    template.write_text("{{ eos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}")
    command = [
        sys.executable,
        "launch/serve.py",
        str(run_folder),
        "port=0",
        "name=mine",
        "prefix_cache=1M",
        "--speculate",
        "lookup",
    ]
    env = {key: value for key, value in os.environ.items() if key != "MANYFORMER_API_KEY"}
    # A shell's background jobs ignore interrupts, and so would the server if these tests were one.
    process = subprocess.Popen(
        [*command, "--chat-template", str(template)], cwd=repo_root, env=env, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("serving mine on http://127.0.0.1:") and "own.jinja" in line, line
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            line.split()[3] + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["model"] == "mine" and answer["usage"]["prompt_tokens"] == 4
    finally:
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM}[number], err
    assert "Traceback" not in err
