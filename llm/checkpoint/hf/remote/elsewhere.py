"""Exported folders in a process of their own, which sees the installed packages but not this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.hf.remote import isolated
from llm.core.errors import UserError

WATCHED = ("pydantic", "omegaconf", "triton")
"""Packages of which it is told whether the process has imported them."""


def run(jobs: Sequence[Mapping[str, Any]], python: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """(one result for each job, watched packages that were imported); see `isolated.run` for the keys of a job.

    python: the interpreter of another environment, whose packages are then used; None: this one's. UserError when the
    process itself fails; a job that fails has the key `error`.
    """
    own = (path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    paths = [] if python else list(dict.fromkeys(own))
    with tempfile.TemporaryDirectory(prefix="export-check-") as folder:
        request, answer = Path(folder) / "jobs.json", Path(folder) / "results.json"
        tree = {"paths": paths, "jobs": list(jobs), "threads": torch.get_num_threads(), "watched": WATCHED}
        request.write_text(json.dumps(tree))
        env = {**os.environ, "HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_OFFLINE": "1"}
        command = [python, "-I"] if python else [sys.executable, "-I", "-S"]
        command += [isolated.__file__, str(request), str(answer)]
        try:
            done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"cannot start {command[0]} to check the export: {error.strerror}") from error
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"the check of the export in a process of its own failed: {last}")
        found = json.loads(answer.read_text())
    return found["results"], found["foreign"]
