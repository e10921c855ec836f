"""The harness itself: results come back by rank, and a rank that fails, dies or hangs is named."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankFailure, run_ranks

pytestmark = pytest.mark.distributed


def add_up(rank: int, start: float) -> tuple[float, str]:
    value = torch.tensor([start + rank])
    dist.all_reduce(value)
    return value.item(), os.environ["WORLD_SIZE"]


def test_results_by_rank() -> None:
    assert run_ranks(add_up, 3, 1.0) == [(6.0, "3")] * 3
    assert "RANK" not in os.environ


def test_tensors_and_closures_pass() -> None:
    offset = torch.arange(3)
    results = run_ranks(lambda rank: offset + rank, 2)
    assert torch.equal(results[1], torch.tensor([1, 2, 3]))


def one_raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_an_error_is_reported_and_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 1: Traceback.*one_raises.*ValueError: the reason"):
        run_ranks(one_raises, 2, timeout=30)
    assert time.monotonic() - start < 10


def one_raises_and_one_hangs(rank: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    time.sleep(60)


def test_a_hanging_rank_does_not_delay_the_report_of_another() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 1: Traceback.*the reason.*rank 0: still running when stopped"):
        run_ranks(one_raises_and_one_hangs, 2, timeout=30)
    assert time.monotonic() - start < 10


def one_dies(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)


def test_a_death_is_reported() -> None:
    with pytest.raises(RankFailure, match="rank 0: died with exit code -9"):
        run_ranks(one_dies, 2)


def hang(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_a_hang_is_ended_with_its_stack() -> None:
    with pytest.raises(RankFailure, match=r"(?s)^rank 1: still running when stopped.*in hang"):
        run_ranks(hang, 2, timeout=2)
