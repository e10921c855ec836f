"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run_python(repo_root: Path) -> Callable[[str], str]:
    """Run code in a fresh Python that must succeed; returns what it wrote to stderr."""

    def call(code: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(repo_root)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return call
