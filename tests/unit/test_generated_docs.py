"""The pages that are made from the registries are those of the registries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_pages_of_blocks_are_current(repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; run: python docs/generate.py"
