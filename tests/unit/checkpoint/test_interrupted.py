"""A save that is killed, or refused by the file system, at any of its stages."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from llm.checkpoint import Checkpointer, resolve_checkpoint
from llm.checkpoint.faults import STAGES, VARIABLE
from llm.core.errors import UserError
from tests.unit.checkpoint.helpers import assert_same, make_state, save_steps, steps_of

COMMITTED = STAGES.index("renamed")


def _save_and_die(root: Path, step: int, stage: str, asynchronous: bool) -> None:
    checkpointer = Checkpointer(root, asynchronous=asynchronous)
    os.environ[VARIABLE] = f"{stage}=kill"
    checkpointer.save(make_state(step + 50), step=step, tokens=1, kind="regular")
    checkpointer.wait()
    os._exit(0)


def _in_child(*args: object) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=_save_and_die, args=args)
    child.start()
    child.join(30)
    return child.exitcode


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at(tmp_path: Path, stage: str, again: bool, asynchronous: bool) -> None:
    """Step 2 is there; step 3, or step 2 anew, is killed at `stage`: the old or the new one is there in full."""
    save_steps(tmp_path, 1, 2)
    step = 2 if again else 3
    code = _in_child(tmp_path, step, stage, asynchronous)
    reached = {"old-moved-away": again, "retention-renamed": not again}.get(stage, True)
    assert code == (-signal.SIGKILL if reached else 0)
    checkpointer = Checkpointer(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if "tmp-" in path.name or "old-" in path.name]
    info = checkpointer.latest_good()
    assert info is not None
    done = not reached or STAGES.index(stage) >= COMMITTED
    assert info.step == (step if done else 2)
    other = make_state(0)
    checkpointer.load(info, other)
    assert_same(other, make_state(step + 50 if done else 2))
    assert len(checkpointer.list()) >= 2
    checkpointer.save(make_state(4), step=4, tokens=4, kind="regular", wait=True)
    assert steps_of(checkpointer)[-1] == 4


def test_first_save_killed_leaves_nothing(tmp_path: Path) -> None:
    _in_child(tmp_path, 1, "manifest-written", True)
    with pytest.raises(UserError, match="no checkpoint in"):
        resolve_checkpoint(tmp_path)
    assert Checkpointer(tmp_path).latest_good() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", STAGES[:COMMITTED])
def test_disk_full_at(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = save_steps(tmp_path, 1, 2)
    checkpointer.poll()
    again = stage == "old-moved-away"
    monkeypatch.setenv(VARIABLE, f"{stage}=full")
    checkpointer.asynchronous = True
    checkpointer.save(make_state(3), step=2 if again else 3, tokens=3, kind="regular")
    checkpointer._flight.finished.wait(10)  # type: ignore[union-attr]
    with pytest.raises(UserError) as caught:
        checkpointer.poll()
    assert "was not saved: no space left for" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "bytes needed" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.delenv(VARIABLE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000000001", "step-000000002"]
    other = make_state(0)
    checkpointer.load(checkpointer.latest_good(), other)  # type: ignore[arg-type]
    assert_same(other, make_state(2))
    assert checkpointer.poll() == []
    checkpointer.save(make_state(3), step=3, tokens=3, kind="regular", wait=True)
    assert [info.step for info in checkpointer.poll()] == [3]


@pytest.mark.parametrize("stage", ["renamed", "retention-renamed"])
def test_refusal_after_the_commit_is_a_warning(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = save_steps(tmp_path, 1, 2)
    monkeypatch.setenv(VARIABLE, f"{stage}=full")
    with caplog.at_level(logging.WARNING):
        checkpointer.save(make_state(3), step=3, tokens=3, kind="regular", wait=True)
    assert len(caplog.records) == 1
    assert checkpointer.latest_good().step == 3  # type: ignore[union-attr]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = save_steps(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match=r"no space left .* bytes needed, 10 free\)"):
        checkpointer.save(make_state(2), step=2, tokens=2, kind="regular")
    assert steps_of(checkpointer) == [1]


def test_error_surfaces_at_the_next_save_or_is_passed_over_when_it_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path)
    monkeypatch.setenv(VARIABLE, "tensors-written=full")
    checkpointer.save(make_state(1), step=1, tokens=1, kind="regular")
    with pytest.raises(UserError, match="step 1 was not saved"):
        checkpointer.save(make_state(2), step=2, tokens=2, kind="regular")
    checkpointer.save(make_state(3), step=3, tokens=3, kind="regular")
    checkpointer._flight.finished.wait(10)  # type: ignore[union-attr]
    monkeypatch.delenv(VARIABLE)
    checkpointer.save(make_state(4), step=4, tokens=4, kind="preempt", wait=True)
    assert "step 3 was not saved" in caplog.text
    assert steps_of(checkpointer) == [4]


def test_a_bug_while_writing_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.checkpoint import checkpointer as module

    monkeypatch.setattr(module, "write_tensors", lambda *a: 1 / 0)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(make_state(1), step=1, tokens=1, kind="regular")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        checkpointer.wait()
    assert list(tmp_path.iterdir()) == []


def test_full_file_system(tmp_path: Path) -> None:
    """A real one: a tmpfs of half a megabyte, filled by someone else while the save runs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        checkpointer = save_steps(disk / "checkpoints", 1)
        (disk / "other").write_bytes(b"x" * (shutil.disk_usage(disk).free - 8192))
        for asynchronous, seen_free in ((True, True), (False, False)):
            checkpointer.asynchronous = asynchronous
            with pytest.MonkeyPatch.context() as patch:
                if not seen_free:
                    usage = shutil.disk_usage(disk)
                    patch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage._replace(free=2**40))
                with pytest.raises(UserError, match=rf"no space left for {disk}/checkpoints \("):
                    checkpointer.save(make_state(2), step=2, tokens=2, kind="regular")
                    checkpointer.wait()
        assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["latest", "step-000000001"]
        assert checkpointer.latest_good().step == 1  # type: ignore[union-attr]
        (disk / "other").unlink()
        checkpointer.save(make_state(2), step=2, tokens=2, kind="regular", wait=True)
        assert checkpointer.latest_good().step == 2  # type: ignore[union-attr]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
