"""Several gloo ranks in one test: forked, so that they start in a tenth of a second instead of ten.

The parent imports the slow parts of torch.distributed, which the children then have.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer step imports it: once here, not in every forked rank
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor


class RankFailure(AssertionError):
    """One or more ranks failed, died or did not end in time; the message holds their tracebacks."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `fn(rank, *args)` in `world_size` processes that share a gloo group; returns their results by rank.

    Results are pickled. An exception in a rank, a death by signal or the time-out ends all ranks and raises
    RankFailure. The processes see RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE as under torchrun.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        readers: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(fn, rank, world_size, args, Path(folder), writer, timeout), daemon=True
            )
            process.start()
            writer.close()
            readers[reader] = rank
            processes.append(process)
        try:
            return _collect(readers, processes, Path(folder), timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(readers: dict[Connection, int], processes: list[Any], folder: Path, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while readers:
        for ready in wait(list(readers), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(ready, Connection)
            rank = readers.pop(ready)
            try:
                ok, payload = pickle.loads(ready.recv_bytes())
            except EOFError:
                processes[rank].join()
                ok, payload = False, f"died with exit code {processes[rank].exitcode}"
            (results if ok else failures)[rank] = payload
            if not ok:
                # The other ranks may fail of this, or hang; only what they say soon is worth having.
                deadline = min(deadline, time.monotonic() + 2.0)
        if time.monotonic() >= deadline:
            break
    if failures or readers:
        parts = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
        for rank in sorted(readers.values()):
            stacks = folder / f"stacks-{rank}"
            parts.append(f"rank {rank}: still running when stopped\n{stacks.read_text() if stacks.exists() else ''}")
        raise RankFailure("\n".join(parts))
    return [results[rank] for rank in range(len(processes))]


def _child(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    folder: Path,
    writer: Connection,
    timeout: float,
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    stacks = (folder / f"stacks-{rank}").open("w")
    faulthandler.dump_traceback_later(max(0.1, timeout - 1.0), file=stacks)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        payload = pickle.dumps((True, fn(rank, *args)))
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    writer.send_bytes(payload)
    writer.close()
    # Without the group's own shutdown, which would wait for ranks that failed.
    os._exit(0)
