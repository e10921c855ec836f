"""Folders below runs/<name>/checkpoints: names, commit, clean-up, retention, and finding the last good one."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from llm.checkpoint.faults import reach
from llm.checkpoint.manifest import Damaged, Manifest, find_damage, read_manifest
from llm.checkpoint.state import KEPT, CheckpointInfo
from llm.checkpoint.storage import sync_folder

log = logging.getLogger("llm.checkpoint")

LATEST = "latest"
_STEP = re.compile(r"step-(\d{9,})")
_TEMPORARY = re.compile(r"(step-\d{9,}|latest)\.tmp-[\w-]+")
_MOVED = re.compile(r"(step-\d{9,})\.old-\w+")


def folder_name(step: int) -> str:
    """step-000001000"""
    return f"step-{step:09d}"


def step_folders(root: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, finished or not, by step."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def info_of(folder: Path, manifest: Manifest) -> CheckpointInfo:
    """What the manifest says of a folder."""
    return CheckpointInfo(folder, manifest.step, manifest.tokens, manifest.kind, True)


def committed(root: Path) -> list[CheckpointInfo]:
    """Checkpoints with a sound manifest and every file at its full size, oldest first; contents are not read."""
    found = []
    for folder in step_folders(root):
        try:
            manifest = read_manifest(folder)
        except Damaged:
            continue
        if not find_damage(folder, manifest, hashes=False):
            found.append(info_of(folder, manifest))
    return found


def clean(root: Path) -> list[str]:
    """Remove what a killed save left behind, and give a moved-away checkpoint its name back; returns what was done."""
    done = []
    for path in sorted(root.iterdir()):
        moved = _MOVED.fullmatch(path.name)
        if moved and not (root / moved[1]).exists():
            path.rename(root / moved[1])
            done.append(f"restored {moved[1]}, whose replacement was interrupted")
        elif moved or _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            done.append(f"removed the leftover {path.name} of an interrupted save")
    if done:
        sync_folder(root)
    return done


def commit(temporary: Path, final: Path, token: str) -> None:
    """Give a finished folder its name, in place of an older one of the same step; then point `latest` at it.

    OSError only when the folder did not get its name. `latest` serves people and other tools, so trouble with it is
    no more than a warning.
    """
    root = final.parent
    old = root / f"{final.name}.old-{token}"
    try:
        if final.exists():
            final.rename(old)
            reach("old-moved-away")
        temporary.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync_folder(root)
    pointer = root / f"{LATEST}.tmp-{token}"
    try:
        reach("renamed")
        with pointer.open("w") as file:
            file.write(final.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        pointer.replace(root / LATEST)
        sync_folder(root)
        reach("latest-written")
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        pointer.unlink(missing_ok=True)
        log.warning("%s is committed, but could not be marked as the latest: %s", final, error)


def set_aside(newest: Path, token: str) -> list[Path]:
    """Rename checkpoints of later steps than the one just committed: the run went back and left them behind, damaged or
    of another attempt. They are neither used nor deleted. Returns their new paths."""
    root = newest.parent
    moved = []
    for folder in step_folders(root):
        if int(folder.name.removeprefix("step-")) > int(newest.name.removeprefix("step-")):
            moved.append(folder.rename(root / f"{folder.name}.abandoned-{token}"))
    return moved


def retire(root: Path, keep: int, token: str, damaged: set[Path]) -> list[Path]:
    """Delete checkpoints beyond the newest `keep` that are neither marked nor known to be damaged; returns them.

    At least two good ones that are newer than any deleted one remain, since keep >= 2.
    """
    good = [info for info in committed(root) if info.path not in damaged]
    loose = [info for info in good if info.kind not in KEPT]
    gone = []
    for info in loose[:-keep]:
        doomed = root / f"{info.path.name}.tmp-delete-{token}"
        info.path.rename(doomed)
        reach("retention-renamed")
        shutil.rmtree(doomed)
        gone.append(info.path)
    return gone
