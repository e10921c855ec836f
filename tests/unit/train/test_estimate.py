"""The estimate: equal to what is counted by hand where that is possible, near the measured peak where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.core.errors import UserError
from llm.train.config import RunConfig
from llm.train.estimate import estimate, estimate_memory
from llm.train.live_memory import LiveMemory

ROOT = Path(__file__).resolve().parents[3]


def config(**changes: Any) -> RunConfig:
    """d_model 128, 2 layers, fp32, AdamW on one CPU, with sections replaced key by key."""
    tree: dict[str, Any] = {
        "name": "estimate",
        "model": {
            "vocab_size": 512,
            "d_model": 128,
            "max_seq_len": 1024,
            "layers": [
                {
                    "pattern": [{"mixer": {"type": "attention", "n_heads": 4}, "channel": {"type": "swiglu"}}],
                    "repeat": 2,
                }
            ],
        },
        "data": {"path": "unused", "seq_len": 256},
        "train": {"steps": 10, "batch_tokens": 1024, "micro_batch_size": 4, "precision": "fp32", "device": "cpu"},
        "parallel": {},
        "optim": {},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return RunConfig.model_validate(tree)


def test_live_memory_counts_storages_once_and_forgets_them() -> None:
    with LiveMemory(grain=1) as memory:
        memory.part = "a"
        x = torch.zeros(100)
        view = x[10:20].view(2, 5)
        memory.part = "b"
        y = x + 1
        assert memory.live == {"a": 400, "b": 400}
        del x
        assert memory.live["a"] == 400, "the view holds it"
        del view, y
        assert memory.live == {"a": 0, "b": 0}
        z = torch.zeros(10)
        memory.move([z], "c")
    assert memory.live == {"a": 0, "b": 0, "c": 40}
    assert memory.peak == 800
    assert memory.at_peak == {"a": 400, "b": 400}


def test_weights_gradients_and_optimizer_state_are_exact() -> None:
    run = config(train={"batch_tokens": 2048})
    count = run.model.cost(256).total.params
    parts = estimate_memory(run, "none").parts
    scalars = 64 * len(list(run.model.build("meta").parameters()))
    assert 4 * count <= parts["weights"] <= 4 * count * 1.02
    # Two microbatches: the gradients of the first are there while the second holds its activations.
    assert 4 * count <= parts["gradients"] <= 4 * count * 1.02
    assert 8 * count <= parts["optimizer"] <= 8 * count * 1.02 + scalars


def test_logits_dominate_a_wide_vocabulary_and_chunks_save_them() -> None:
    wide = config(model={"vocab_size": 20_000})
    n_logits = 4 * 4 * 256 * 20_000
    whole = estimate_memory(wide, "full").parts["logits"]
    assert 1.9 * n_logits <= whole <= 4 * n_logits
    chunked = estimate_memory(config(model={"vocab_size": 20_000}, train={"loss_chunk": 128}), "full").parts["logits"]
    assert chunked < whole / 3


def test_checkpointing_orders_activations_and_full_keeps_one_input_per_block() -> None:
    run = config(model={"layers": [{**config().to_dict()["model"]["layers"][0], "repeat": 8}]})
    none, selective, full = (estimate_memory(run, mode).parts["activations"] for mode in ("none", "selective", "full"))
    assert full < selective < none
    per_block = 4 * 4 * 256 * 128
    assert full >= 8 * per_block


@pytest.mark.parametrize("strategy, world_size", [("fsdp2", 8), ("fsdp2", 2), ("deepspeed", 4)])
def test_sharding_divides_what_it_should(strategy: str, world_size: int) -> None:
    parallel = {"strategy": strategy} | ({"zero_stage": 3} if strategy == "deepspeed" else {})
    run = config(parallel=parallel, train={"batch_tokens": 1024 * world_size})
    count = run.model.cost(256).total.params
    parts = estimate_memory(run, "none", world_size).parts
    assert parts["weights"] == -(-4 * count // world_size)
    assert parts["gradients"] == -(-4 * count // world_size)
    assert parts["optimizer"] == pytest.approx(8 * count / world_size, rel=0.01)
    assert parts["activations"] == pytest.approx(estimate_memory(config(), "none").parts["activations"], rel=0.2)


def test_hsdp_shards_over_one_group_only() -> None:
    run = config(parallel={"strategy": "fsdp2", "replicate": 2}, train={"batch_tokens": 8192})
    count = run.model.cost(256).total.params
    assert estimate_memory(run, "none", 8).parts["weights"] == -(-4 * count // 4)


def test_offload_moves_what_is_sharded_to_the_host() -> None:
    found = estimate_memory(config(parallel={"strategy": "fsdp2", "cpu_offload": True}), "none", 1)
    assert found.parts["weights"] == found.parts["optimizer"] == 0
    assert found.host > 0


@pytest.mark.parametrize(
    "parallel, world_size, named",
    [({}, 2, "world_size=2"), ({"strategy": "fsdp2", "replicate": 3}, 4, "parallel.replicate 3")],
)
def test_impossible_world_sizes_are_named(parallel: dict[str, Any], world_size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        estimate_memory(config(parallel=parallel), "none", world_size)


def test_estimate_answers_everything() -> None:
    run = config()
    found = estimate(run, modes=("none", "full"))
    cost = run.model.cost(256).total
    assert found["parameters"] == cost.params == sum(p.numel() for p in set(run.model.build("meta").parameters()))
    assert found["training_flops_per_token"] == 3 * cost.flops_per_token
    assert (
        found["hardware_flops_per_token"]["full"]
        > found["hardware_flops_per_token"]["none"]
        == 3 * cost.flops_per_token
    )
    assert found["tokens"] == 10 * 1024
    assert found["memory_per_rank"]["none"]["total"] > found["memory_per_rank"]["full"]["total"]
    json.dumps(found)


def measured(run: RunConfig) -> int:
    """Growth of the peak resident set of a process that trains for a step."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    environment |= {"OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("measure_step.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(run.to_dict())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_estimate_is_within_15_percent_of_the_measured_peak(mode: str) -> None:
    layer = {"pattern": [{"mixer": {"type": "attention", "n_heads": 8}, "channel": {"type": "swiglu"}}], "repeat": 6}
    run = config(
        model={"vocab_size": 4096, "d_model": 256, "layers": [layer]},
        train={"activation_checkpointing": mode, "batch_tokens": 2048, "micro_batch_size": 8},
    )
    expected = estimate_memory(run, mode).total  # type: ignore[arg-type]
    assert expected == pytest.approx(measured(run), rel=0.15)
