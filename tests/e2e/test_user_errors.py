"""Bad configs and inputs: each ends with exit code 2 and one readable message that names the cause and what to do.

A case is a command line, the files it needs, and pieces that its message must hold. In arguments, environment and
pieces $TMP is an empty folder of the case, $DATA prepared data, $TEXT the text they come from, $BASE a good run config,
$RUN a finished run of it and $PREPARE the prepare config; the case may spoil none of these but copies of them.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from string import Template
from types import SimpleNamespace

import pytest

from tests.e2e.bad import Case, World, call
from tests.e2e.bad_configs import CONFIGS
from tests.e2e.bad_inputs import DATA, RESUME, USE
from tests.e2e.tiny import prepare_tree, run_tree, write_corpus, write_yaml

CASES = [*CONFIGS, *DATA, *RESUME, *USE]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("good")
    text, data = write_corpus(root / "text"), root / "data"
    prepare = write_yaml(root / "prepare.yaml", prepare_tree(text, data))
    base = write_yaml(root / "base.yaml", run_tree(data, root / "runs"))
    assert call("prepare", str(prepare)) == 0
    assert call("train", str(base)) == 0
    return World(text, data, base, root / "runs" / "tiny", prepare)


def filled(text: str, world: World, tmp: Path) -> str:
    names = {
        "TMP": tmp,
        "TEXT": world.text,
        "DATA": world.data,
        "BASE": world.base,
        "RUN": world.run,
        "PREPARE": world.prepare,
    }
    return Template(text).substitute(names)


def arguments(case: Case, world: World, tmp: Path) -> list[str]:
    words = case.argv.split() if isinstance(case.argv, str) else case.argv
    return [filled(word, world, tmp) for word in words]


def check_message(case: Case, command: str, code: int, err: str, pieces: list[str]) -> None:
    assert "Traceback" not in err, err
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) <= case.lines, err
    start = f"manyformer {command}: "
    assert sum(line.startswith((start, "manyformer: ")) for line in lines) == 1, err
    assert err.endswith("\n")
    for piece in pieces:
        assert piece in err, f"{piece!r} is not in: {err}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_message(case: Case, world: World, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    if not case.needs():
        pytest.skip("cannot happen here")
    if case.make is not None:
        case.make(world, tmp_path)
    if case.id == "no-wandb":
        monkeypatch.setitem(sys.modules, "wandb", None)
    for key, value in case.env.items():
        monkeypatch.setenv(key, filled(value, world, tmp_path))
    stdin = SimpleNamespace(buffer=io.BytesIO(case.stdin or b""), isatty=lambda: case.stdin is None)
    monkeypatch.setattr(sys, "stdin", stdin)
    argv = arguments(case, world, tmp_path)
    ran = cli(*argv)
    check_message(case, argv[0], ran.code, ran.err, [filled(piece, world, tmp_path) for piece in case.says])


def test_ids_are_unique_and_many() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 30


IN_A_PROCESS = ("section-typo", "short-bin", "prompt-not-utf8", "world-size")


@pytest.mark.parametrize("case", [case for case in CASES if case.id in IN_A_PROCESS], ids=lambda case: case.id)
def test_message_in_a_process_of_its_own(case: Case, world: World, tmp_path: Path, run_cli) -> None:
    if case.make is not None:
        case.make(world, tmp_path)
    argv = arguments(case, world, tmp_path)
    ran = run_cli(*argv, **{key: filled(value, world, tmp_path) for key, value in case.env.items()})
    name = argv[0]
    check_message(case, name, ran.code, ran.err, [filled(piece, world, tmp_path) for piece in case.says])


def test_a_good_run_of_the_same_kind_is_accepted(world: World, cli) -> None:
    """The cases differ from this in their mistake alone."""
    assert cli("train", world.base, "--check").code == 0
    assert cli("generate", world.run, "--prompt", "a", "max_new_tokens=3").code == 0
    assert cli("evaluate", world.run, world.text / "00.txt").code == 0
