"""launch/evaluate.py: exact bytes, the same figures from every form of a text, readable mistakes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.generate.runs import prepare_data, write_run

Cli = Callable[..., Any]
TEXTS = [f"document {i}: " + "h\u00e9llo world\r\n" * (i % 7 + 1) for i in range(24)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("data"), TEXTS)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", data=str(data))


def test_the_runs_own_held_out_data(cli: Cli, run_folder: Path, data: Path) -> None:
    done = cli("evaluate", run_folder, "--compressors")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    raw = (data / "valid.raw").read_bytes()
    manifest = json.loads((data / "manifest.json").read_text())
    assert result["n_bytes"] == len(raw) > 0
    assert result["n_documents"] == manifest["splits"]["valid"]["documents"]
    assert result["n_tokens"] == len(raw) + result["n_documents"], "bytes and one end-of-text each"
    assert result["compressors"]["gzip -9"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert result["bits_per_byte"] == pytest.approx(result["bits_per_token"] * result["n_tokens"] / len(raw))
    for word in ("gzip -9", "bz2 -9", "xz -9", "this model"):
        assert word in done.err
    assert json.loads((run_folder / "evaluate.json").read_text()) == result


def test_raw_files_give_the_figures_of_the_prepared_folder(
    cli: Cli, run_folder: Path, data: Path, tmp_path: Path
) -> None:
    prepared = json.loads(cli("evaluate", run_folder, data, "stride=7", "precision=fp32").out)
    assert prepared["stride"] == 7
    raw = (data / "valid.raw").read_bytes()
    held = [path for path in sorted((data.parent / "texts").iterdir()) if path.read_bytes() in raw]
    files = json.loads(cli("evaluate", run_folder, *held, "stride=7", "precision=fp32").out)
    assert files["n_documents"] == prepared["n_documents"] and files["n_bytes"] == prepared["n_bytes"]
    assert files["loss"] == pytest.approx(prepared["loss"], rel=1e-6)


def test_data_of_another_tokenizer_is_encoded_again(cli: Cli, run_folder: Path, data: Path, tmp_path: Path) -> None:
    other = prepare_data(tmp_path, TEXTS, kind="bpe")
    ours = json.loads(cli("evaluate", run_folder, data).out)
    theirs = json.loads(cli("evaluate", run_folder, other).out)
    assert theirs["n_bytes"] == ours["n_bytes"] and theirs["n_tokens"] == ours["n_tokens"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6)


def test_other_data_do_not_replace_the_runs_own_result(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    own = cli("evaluate", run_folder).out
    (tmp_path / "story.txt").write_text("once upon a time")
    assert cli("evaluate", run_folder, tmp_path / "story.txt", "precision=bf16").code == 0
    assert json.loads((run_folder / "evaluate.json").read_text()) == json.loads(own)
    other = json.loads((run_folder / "evaluate-story.json").read_text())
    assert other["n_bytes"] == 16 and other["precision"] == "bf16"
    cli("evaluate", run_folder, tmp_path / "story.txt", f"out={tmp_path}/deep/x.json")
    assert (tmp_path / "deep" / "x.json").is_file()


def test_the_first_documents_only(cli: Cli, run_folder: Path) -> None:
    result = json.loads(cli("evaluate", run_folder, "max_documents=2", "--compressors", "out=/dev/null").out)
    assert result["n_documents"] == 2
    assert result["n_tokens"] == result["n_bytes"] + 2


MISTAKES = [
    (["/nonexistent/text"], "no such file or folder: /nonexistent/text"),
    (["stride=0"], "stride=0 must lie between 1 and the window length 48"),
    (["stride=49"], "stride=49 must lie between 1 and the window length 48"),
    (["stride=most"], "stride"),
    (["precision=fp8"], "precision"),
    (["split=test"], "no documents in split 'test'"),
    (["contxt=12"], "did you mean 'context'"),
    (["--compresors"], "did you mean --compressors"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes(cli: Cli, run_folder: Path, arguments: list[str], message: str) -> None:
    done = cli("evaluate", run_folder, *arguments)
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err


def test_texts_that_cannot_be_scored(cli: Cli, run_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ([tmp_path / "latin.txt"], "latin.txt is not valid UTF-8: byte 0xe9 at offset 3"),
        ([tmp_path / "empty.txt"], "holds no text"),
        ([tmp_path / "folder"], "no manifest.json in"),
        ([data, tmp_path / "empty.txt"], "give one folder of prepared data, or text files"),
    ):
        done = cli("evaluate", run_folder, *arguments)
        assert done.code == 2 and message in done.err, done.err


def test_a_model_without_data(cli: Cli, tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare")
    done = cli("evaluate", bare)
    assert done.code == 2 and "names no data of its own" in done.err
    assert cli("evaluate").code == 2
