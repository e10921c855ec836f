"""Shared by all tests: one thread per process, fixed seeds, paths, and ways to run a command."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the threads as they were."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger real texts: MANYFORMER_DATA, or shared/data in or beside the checkout; skips without it."""
    named = os.environ.get("MANYFORMER_DATA")
    for folder in [Path(named)] if named else [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]:
        if folder.is_dir():
            return folder
    pytest.skip("no folder of shared data; name one with MANYFORMER_DATA")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command within this process, fast: `cli("train", "configs/run/x.yaml", "a.b=1")`."""
    from launch.cli import main

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code
        out, err = capfd.readouterr()
        return Ran(code if isinstance(code, int) else int(code is not None), out, err)

    return call


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Ran]:
    """Run a command in a process of its own, as a user does: about four seconds of imports each."""

    def call(*arguments: object, cwd: Path = ROOT, timeout: float = 120, **environment: str) -> Ran:
        command = [sys.executable, str(ROOT / "launch" / "cli.py"), *map(str, arguments)]
        env = {**os.environ, **environment}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        return Ran(done.returncode, done.stdout, done.stderr)

    return call
