"""What a run ran on and from: recorded so that a figure can be traced to its conditions."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llm.train.hardware import cpu_name, device_memory, device_name, num_cores

PACKAGES = (
    "manyformer",
    "torch",
    "triton",
    "numpy",
    "tokenizers",
    "datasets",
    "transformers",
    "deepspeed",
    "safetensors",
)


@functools.cache
def git_revision(folder: Path | None = None) -> str:
    """Commit of the source tree, with "-dirty" when tracked files differ from it; "" outside a git checkout."""
    where = folder or Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(where), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{revision}-dirty" if changed else revision


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware(device: torch.device, world_size: int = 1) -> dict[str, Any]:
    """Name, count and memory of the devices, and the host's CPU."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "device_memory_bytes": device_memory(device),
        "world_size": world_size,
        "cpu": cpu_name(),
        "num_cores": num_cores(),
        "num_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def environment(device: torch.device, world_size: int = 1) -> dict[str, Any]:
    """Everything above, with the command line and the scheduler's job id."""
    return {
        "git_revision": git_revision(),
        "versions": versions(),
        "hardware": hardware(device, world_size),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "job": os.environ.get("SLURM_JOB_ID", ""),
    }
