"""Row-wise AdamW on the tables of memory layers: the same run and the same state under every strategy that has rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm.checkpoint import Checkpointer, TrainState
from llm.core.errors import UserError
from llm.models.config import ModelConfig
from llm.train.strategies import NamedState
from tests.distributed.harness import run_ranks
from tests.distributed.steps import (
    LENGTH,
    VOCAB,
    load_and_train,
    losses_and_norms,
    plain,
    start,
    tiny_run,
    train_and_state,
    train_steps,
)

pytestmark = pytest.mark.distributed

OPTIM: dict[str, Any] = {"groups": [{"match": ["*.tables", "embed.*"], "optimizer": "rowwise_adamw"}]}
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp-2": (2, {"strategy": "ddp"}),
    "fsdp2-2": (2, {"strategy": "fsdp2"}),
    "hsdp-2x2": (4, {"strategy": "fsdp2", "replicate": 2}),
}


def model() -> ModelConfig:
    """Nine tables of eight rows per linear, a number that no world size divides; untied, so that tokens that are not in
    a batch leave rows of the embedding without a gradient."""
    block = {"mixer": {"type": "attention", "n_heads": 3, "out_proj": False}, "channel": {"type": "swiglu"}}
    return ModelConfig.model_validate(
        {
            "vocab_size": VOCAB, "d_model": 27, "max_seq_len": LENGTH, "position": {"type": "learned"},
            "layers": [{"pattern": [block]}], "head": {"tied": False},
            "linear": {"mixer.*": {"type": "memory_layer", "n_bits": 3}},
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_same_run_and_state(name: str) -> None:
    world_size, parallel = PLACES[name]
    straight, norms = losses_and_norms(0, tiny_run(optim=OPTIM), model(), 5, 1)
    run = tiny_run(optim=OPTIM, parallel=parallel)
    losses, found_norms = run_ranks(losses_and_norms, world_size, run, model(), 5, 1, timeout=200)[0]
    assert losses == pytest.approx(straight, rel=1e-4)
    assert found_norms == pytest.approx(norms, rel=1e-3)

    expected = train_and_state(0, tiny_run(optim=OPTIM), model(), 3)
    state: NamedState = run_ranks(train_and_state, world_size, run, model(), 3, timeout=200)[0]
    for parameter in ("layers.0.mixer.q.tables", "embed.weight"):
        assert set(state.optim[parameter]) == {"row_step", "exp_avg", "row_exp_avg_sq"}
        for key, value in expected.optim[parameter].items():
            scale = float(value.abs().max())
            torch.testing.assert_close(state.optim[parameter][key], value, rtol=1e-3, atol=1e-4 * scale)
    counts = state.optim["embed.weight"]["row_step"]
    assert counts.min() < 3 and counts.max() == 3
    assert load_and_train(0, tiny_run(optim=OPTIM), model(), state, 3, 2) == pytest.approx(straight[3:], rel=1e-4)


def save(rank: int, run: Any, root: Path) -> NamedState:
    strategy = start(run, model())
    train_steps(strategy, 3, 1)
    state = strategy.state()
    Checkpointer(root, asynchronous=False).save(TrainState(state.model, state.optim), step=3, tokens=3, kind="keep")
    return plain(state)


def load(rank: int, run: Any, root: Path) -> NamedState:
    strategy = start(run, model())
    state = strategy.state()
    checkpointer = Checkpointer(root, asynchronous=False)
    found = checkpointer.latest_good()
    assert found is not None
    checkpointer.load(found, TrainState(state.model, state.optim))
    strategy.load(state)
    return plain(strategy.state())


def test_checkpoint_of_two_ranks_is_read_by_any_number(tmp_path: Path) -> None:
    run = tiny_run(optim=OPTIM, parallel={"strategy": "fsdp2"})
    saved: NamedState = run_ranks(save, 2, run, tmp_path, timeout=200)[0]
    for read in (load(0, tiny_run(optim=OPTIM), tmp_path), run_ranks(load, 4, run, tmp_path, timeout=200)[0]):
        for name, slots in saved.optim.items():
            assert torch.equal(read.model[name], saved.model[name])
            for key, value in slots.items():
                assert torch.equal(read.optim[name][key], value), (name, key)


def refused(rank: int, run: Any) -> str:
    try:
        start(run, model())
    except UserError as error:
        return str(error)
    return ""


def test_deepspeed_is_refused() -> None:
    pytest.importorskip("deepspeed")
    run = tiny_run(optim=OPTIM, parallel={"strategy": "deepspeed"})
    assert "needs whole rows" in run_ranks(refused, 1, run, timeout=100)[0]
