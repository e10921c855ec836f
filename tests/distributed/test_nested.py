"""Nested training gives the same losses on two ranks as in one process, though a step may use parts of its matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.core.batch import Microbatch
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.train.loss import LanguageModelLoss
from tests.distributed.harness import run_ranks
from tests.distributed.steps import CLIP, SEQUENCES, VOCAB, start, step_tokens, tiny_run, valid_labels

pytestmark = pytest.mark.distributed
STEPS = 8


def model(objective: str, channel: str) -> ModelConfig:
    block = {
        "mixer": {"type": "attention", "n_heads": 4, "n_kv_heads": 2},
        "channel": {"type": channel, "d_hidden": 64},
    }
    return ModelConfig.model_validate(
        {
            "vocab_size": VOCAB, "d_model": 32, "max_seq_len": 16, "layers": [{"pattern": [block], "repeat": 2}],
            "wrappers": [{"type": "nested", "objective": objective}],
        }
    )  # fmt: skip


def losses_and_norms(rank: int, run: Any, config: ModelConfig, accumulation: int) -> tuple[list[float], list[float]]:
    """Training losses (of the drawn width, or the sum of all) and gradient norms, with the trainer's hook and loss."""
    strategy = start(run, config)
    loss = LanguageModelLoss()
    rows = SEQUENCES // strategy.world_size
    size = rows // accumulation
    losses, norms = [], []
    for step in range(STEPS):
        before_step(strategy.model, Progress(step, STEPS, seed=1))
        first = strategy.rank * rows
        tokens = step_tokens(step)[first : first + rows]
        labels = valid_labels(tokens, first)
        count = strategy.all_reduce((labels != -100).sum().float())
        total = torch.zeros(())
        for index in range(accumulation):
            part = slice(index * size, (index + 1) * size)
            x = tokens[part, :-1]
            batch = Microbatch(tokens=x, labels=labels[part], seq=SeqInfo.contiguous(*x.shape))
            with strategy.accumulate(last=index == accumulation - 1):
                with strategy.autocast():
                    out = loss(strategy.model, batch)
                strategy.backward(out.sum / count)
            total += out.sum.detach()
        norms.append(float(strategy.clip(CLIP)))
        strategy.step(1.0, skip=False)
        losses.append(float(strategy.all_reduce(total) / count))
    return losses, norms


PLACES = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
}


@pytest.mark.parametrize("objective", ["sampled", "summed"])
@pytest.mark.parametrize(("place", "channel"), [("ddp", "nested_mlp"), ("fsdp2", "nested_gated"), ("fsdp2", "swiglu")])
def test_losses_are_those_of_one_process(place: str, channel: str, objective: str) -> None:
    config = model(objective, channel)
    losses, norms = losses_and_norms(0, tiny_run(), config, 1)
    assert len(set(losses)) == STEPS
    found = run_ranks(losses_and_norms, 2, tiny_run(parallel=PLACES[place]), config, 2, timeout=120)
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)


def test_zero3_slices_what_it_gathered() -> None:
    pytest.importorskip("deepspeed")
    config = model("sampled", "nested_gated")
    losses, norms = losses_and_norms(0, tiny_run(), config, 1)
    found = run_ranks(losses_and_norms, 2, tiny_run(parallel=PLACES["zero3"]), config, 2, timeout=240)
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_under_fsdp2(mode: str) -> None:
    config = model("summed", "nested_gated")
    losses, norms = losses_and_norms(0, tiny_run(), config, 1)
    run = tiny_run(parallel=PLACES["fsdp2"], train={"activation_checkpointing": mode})
    found = run_ranks(losses_and_norms, 2, run, config, 1, timeout=120)
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
