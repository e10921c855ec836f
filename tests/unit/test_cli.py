"""The shell around the commands: help, exit codes, one line per mistake, encodings, and running from a source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import _cli, cli
from launch._cli import Parser, run
from llm.core.errors import UserError


def end_of(main: Callable[[list[str]], int | None], *argv: str, prog: str = "train", doc: str = "the help") -> Any:
    with pytest.raises(SystemExit) as ended:
        run(main, prog=prog, doc=doc, argv=argv)
    return ended.value.code


def raising(error: BaseException) -> Callable[[list[str]], int | None]:
    def main(argv: list[str]) -> int | None:
        raise error

    return main


def test_codes_are_passed_on() -> None:
    assert end_of(lambda argv: None) == 0
    assert end_of(lambda argv: 75) == 75


def test_arguments_arrive() -> None:
    seen: list[str] = []
    end_of(lambda argv: seen.extend(argv), "a.yaml", "x=1")
    assert seen == ["a.yaml", "x=1"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_does_not_run(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(raising(AssertionError()), "a.yaml", flag) == 0
    assert capsys.readouterr().out == "the help\n"


def test_help_after_two_dashes_is_an_argument() -> None:
    assert end_of(lambda argv: 5 if argv == ["--", "--help"] else 1, "--", "--help") == 5


def test_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(raising(UserError("data.path: no such file"))) == 2
    assert capsys.readouterr().err == "manyformer train: data.path: no such file\n"


def test_user_error_with_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MANYFORMER_DEBUG", "1")
    assert end_of(raising(UserError("bad"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("manyformer train: bad\n")


def test_other_ranks_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    end_of(raising(UserError("bad")))
    assert capsys.readouterr().err == "manyformer train [rank 3]: bad\n"


def test_faults_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), prog="train", doc="", argv=[])


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(raising(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


def test_argument_that_is_not_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(raising(AssertionError()), "ok", os.fsdecode(b"caf\xe9")) == 2
    assert capsys.readouterr().err == (
        "manyformer train: argument 2 is not valid UTF-8: b'caf\\xe9'; give it in UTF-8 or in a file\n"
    )


def test_foreign_kernels_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import kernels

    monkeypatch.delattr(kernels, "OWNER")
    assert end_of(lambda argv: 0) == 2
    assert "which is not Manyformer's package; uninstall it" in capsys.readouterr().err


def test_parser_reports_the_nearest_option() -> None:
    parser = Parser()
    parser.add_argument("--temperature", type=float)
    parser.add_argument("path")
    with pytest.raises(UserError, match=r"unknown argument '--temprature=1'; did you mean --temperature\?"):
        parser.parse_args(["a", "--temprature=1"])
    with pytest.raises(UserError, match="argument --temperature: invalid float value: 'x'"):
        parser.parse_args(["a", "--temperature", "x"])
    with pytest.raises(UserError, match="the following arguments are required: path"):
        parser.parse_args([])


def test_commands_are_the_files_that_exist(repo_root: Path) -> None:
    files = {path.stem for path in (repo_root / "launch").glob("*.py") if not path.stem.startswith("_")}
    assert set(cli.commands()) == files - {"cli"}


def test_each_command_has_help_and_main(cli: Callable[..., Any]) -> None:
    from launch.cli import commands

    for name in commands():
        done = cli(name, "--help")
        assert done.code == 0, (name, done)
        assert "usage" in done.out.lower(), name
        assert "manyformer" in done.out or f"launch/{name}.py" in done.out, name


def test_unknown_command(cli: Callable[..., Any]) -> None:
    done = cli("trian")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("manyformer: unknown command 'trian'")


def test_overview_and_version(cli: Callable[..., Any]) -> None:
    assert cli().out == cli("--help").out
    assert cli("--help").out.startswith("usage: manyformer COMMAND")
    assert cli("--version").out.startswith("manyformer ")


def test_broken_pipe_is_quiet(repo_root: Path) -> None:
    script = (
        "from launch._cli import run\n"
        "def main(argv):\n    for _ in range(1000): print('x' * 1000)\n"
        "run(main, prog='x', doc='')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (0, b"")


@pytest.mark.parametrize("flags", [[], ["-P"]], ids=["plain", "safe-path"])
def test_runs_from_a_source_tree_without_installation(repo_root: Path, tmp_path: Path, flags: list[str]) -> None:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *flags, str(repo_root / "launch" / "cli.py"), "--help"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_exit_codes_are_documented() -> None:
    assert (_cli.EXIT_USAGE, _cli.EXIT_REQUEUE, _cli.EXIT_INTERRUPTED) == (2, 75, 130)
