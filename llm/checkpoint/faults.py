"""Fault injection: tests and the resume matrix stop, slow or fail a save at a named stage.

The environment variable MANYFORMER_CHECKPOINT_FAULT holds "stage=action" pairs separated by commas. A stage is one of
STAGES or "*"; an action is "kill" (SIGKILL to this process), "sleep:SECONDS" or "full" (the disk is full).
"""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "MANYFORMER_CHECKPOINT_FAULT"

STAGES = (
    "begin",
    "folder-made",
    "tensors-half-written",
    "tensors-written",
    "meta-written",
    "manifest-written",
    "old-moved-away",
    "renamed",
    "latest-written",
    "retention-renamed",
    "done",
)
"""In the order in which a save reaches them; "old-moved-away" and "retention-renamed" only if there is an old one."""


def reach(stage: str) -> None:
    """Called by a save when it arrives at `stage`; does nothing unless the environment asks for a fault there."""
    assert stage in STAGES, stage
    for pair in filter(None, os.environ.get(VARIABLE, "").split(",")):
        where, _, action = pair.partition("=")
        if where not in (stage, "*"):
            continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            assert action.startswith("sleep:"), f"{VARIABLE}: unknown action {action!r}"
            time.sleep(float(action.removeprefix("sleep:")))
