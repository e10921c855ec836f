"""torchrun for schedulers: the same arguments, but signals reach the workers and their exit code comes out.

Plain torchrun ends with 1 whatever its workers returned, dies of SIGUSR1 without telling them, and gives them 30 s
after SIGTERM. Here SIGTERM and SIGUSR1 are handed to the workers, which save and end with 75 in their own time, and
this process then ends with 75 too, upon which Slurm or Kubernetes starts the job again.

usage: python launch/_torchrun.py [torchrun options] launch/train.py CONFIG.yaml [key=value ...]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def main(argv: Sequence[str]) -> int:
    """Run torchrun with these arguments; returns the exit code that stands for all workers of this node."""
    for number in FORWARDED:
        signal.signal(number, _forward)
    try:
        run(get_args_parser().parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv]))
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return exit_code([failure.exitcode for failure in error.failures.values()])
    return 0


def exit_code(codes: Sequence[int]) -> int:
    """One code for a node: 75 or 2 when a worker ended so by itself (the others are then killed), otherwise 1."""
    for wanted in (75, 2):
        own = [code for code in codes if code != -signal.SIGTERM]
        if own and all(code == wanted for code in own):
            return wanted
    return 1


def _forward(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the workers: the direct children of this process that run Python scripts of the job."""
    for child in psutil.Process(os.getpid()).children():
        if "RANK" in _environment(child):
            child.send_signal(number)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
