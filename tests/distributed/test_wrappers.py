"""Wrapped models train alike under every strategy, though their blocks run several times in a forward pass."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.steps import losses_and_norms, tiny_model, tiny_run

pytestmark = pytest.mark.distributed

WRAPPERS: dict[str, dict[str, Any]] = {
    "loop": {"type": "loop", "n_pre": 1, "n_loop": 1, "n_loops": 3, "inject": "add", "gradient_window": 2},
    "rmt": {"type": "rmt", "n_memory": 2, "segment": 6, "checkpoint_segments": True},
    "retrieval": {"type": "rmt", "n_memory": 2, "segment": 6, "retrieval": True},
    "armt": {"type": "armt", "n_memory": 2, "segment": 6, "d_memory": 4},
    "fit": {"type": "fit", "stages": "(1)1(1)", "group": 6, "n_latents": 2, "n_heads": 2},
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_losses_are_those_of_one_process(name: str, strategy: str) -> None:
    model = tiny_model().replace(wrappers=[WRAPPERS[name]])
    losses, norms = losses_and_norms(0, tiny_run(), model, 5, 1)
    run = tiny_run(parallel={"strategy": strategy}, train={"activation_checkpointing": "full"})
    results = run_ranks(losses_and_norms, 2, run, model, 5, 2, timeout=250)
    assert all(result == results[0] for result in results)
    assert results[0][0] == pytest.approx(losses, rel=1e-4)
    assert results[0][1] == pytest.approx(norms, rel=1e-3)
