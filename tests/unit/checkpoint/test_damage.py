"""Every kind of damage is found, named, and passed over for the checkpoint before it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from llm.checkpoint import Checkpointer, Damaged, load_model_tensors, resolve_checkpoint
from llm.core.errors import UserError
from tests.unit.checkpoint.helpers import assert_same, make_state, save_steps

SHARD = "model/rank-00000.safetensors"


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x10
    path.write_bytes(data)


def _edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte in the weights": (lambda d: _flip(d / SHARD, -3), f"{SHARD} does not match its SHA-256"),
    "flipped byte in a header": (lambda d: _flip(d / SHARD, 12), f"{SHARD} does not match its SHA-256"),
    "flipped byte in the optimizer": (
        lambda d: _flip(d / "optim/rank-00000.safetensors", -1),
        "optim/rank-00000.safetensors does not match its SHA-256",
    ),
    "flipped byte in an RNG state": (
        lambda d: _flip(d / "rng/rank-00000.safetensors", -1),
        "rng/rank-00000.safetensors does not match its SHA-256",
    ),
    "truncated shard": (
        lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-7]),
        f"{SHARD} has .* bytes instead of .*: truncated",
    ),
    "empty shard": (lambda d: (d / SHARD).write_bytes(b""), f"{SHARD} has 0 bytes instead of"),
    "missing shard": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing"),
    "missing config": (lambda d: (d / "config.yaml").unlink(), "config.yaml is missing"),
    "broken meta": (lambda d: _flip(d / "meta.json", 0), "meta.json does not match its SHA-256"),
    "truncated manifest": (
        lambda d: (d / "manifest.json").write_bytes((d / "manifest.json").read_bytes()[:200]),
        "manifest.json is not a JSON object: truncated",
    ),
    "binary manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json is not a JSON object"),
    "missing manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "altered manifest": (lambda d: _edit_manifest(d, step=7), "manifest.json does not match its own digest"),
    "manifest of another schema": (lambda d: _edit_manifest(d, schema=99), "schema 99; this version .* reads schema 1"),
    "manifest that is a list": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json is not a JSON object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_named_and_passed_over(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    damage, words = DAMAGE[name]
    checkpointer = save_steps(tmp_path, 1, 2)
    damage(tmp_path / "step-000000002")
    with caplog.at_level(logging.ERROR):
        info = checkpointer.latest_good()
    assert info is not None and info.step == 1
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert "step-000000002 is damaged and not used" in line and "\n" not in line
    with pytest.raises(Damaged, match=words) as caught:
        checkpointer.load(tmp_path / "step-000000002", make_state(3))
    assert "\n" not in str(caught.value)
    other = make_state(3)
    checkpointer.load(info, other)
    assert_same(other, make_state(1))
    assert resolve_checkpoint(tmp_path) == info.path
    with pytest.raises(Damaged, match=words):
        resolve_checkpoint(tmp_path / "step-000000002")


def test_damage_is_said_on_stderr_without_any_logging_set_up(tmp_path: Path, run_python: Callable[[str], str]) -> None:
    save_steps(tmp_path, 1, 2)
    _flip(tmp_path / "step-000000002" / SHARD, -1)
    call = f"Checkpointer(Path({str(tmp_path)!r})).latest_good()"
    err = run_python(f"from llm.checkpoint import *; from pathlib import Path; assert {call}.step == 1")
    assert "step-000000002 is damaged and not used" in err and SHARD in err


def test_several_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = save_steps(tmp_path, 1, 2, 3, keep=3)
    for step in (2, 3):
        _flip(tmp_path / f"step-00000000{step}" / SHARD, -1)
    assert checkpointer.latest_good().step == 1  # type: ignore[union-attr]
    assert [r.getMessage().split(" is damaged")[0][-1] for r in caplog.records] == ["3", "2"]
    (tmp_path / "step-000000001" / SHARD).unlink()
    with pytest.raises(UserError, match="none of the 3 checkpoints .* is intact"):
        checkpointer.latest_good()
    with pytest.raises(UserError, match="none of the 3 checkpoints .* is intact"):
        resolve_checkpoint(tmp_path)


def test_model_tensors_of_a_damaged_one(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    folder = tmp_path / "step-000000001"
    _flip(folder / "optim/rank-00000.safetensors", -1)
    load_model_tensors(folder)
    _flip(folder / SHARD, -1)
    with pytest.raises(Damaged, match="does not match its SHA-256"):
        load_model_tensors(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flips")
    save_steps(root, 1, config_yaml="name: x\n")
    return root


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_any_flipped_bit_is_found(saved: Path, data: st.DataObject) -> None:
    """Of any file. A flip in the manifest's white space may go unseen, for it changes nothing."""
    folder = saved / "step-000000001"
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    before = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7))
    after = bytearray(before)
    after[at] ^= 1 << bit
    path.write_bytes(after)
    try:
        with pytest.raises(UserError):
            Checkpointer(saved).load(folder, make_state(2))
        seen = True
    except BaseException:
        same = path.name == "manifest.json" and json.loads(bytes(after)) == json.loads(before)
        if not same:
            raise
        seen = False
    finally:
        path.write_bytes(before)
    assert seen or path.name == "manifest.json"
