"""A stand-in for the trainer, with the attributes that callbacks may use."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llm.train.anomaly import AnomalyJudge
from llm.train.callbacks.base import StepOut
from llm.train.config import RunConfig


def run_config(runs_dir: Path | str = "runs", **sections: Any) -> RunConfig:
    """A small valid run, sections updated key by key."""
    layers = [{"pattern": [{"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu"}}], "repeat": 2}]
    tree: dict[str, Any] = {
        "name": "small",
        "runs_dir": str(runs_dir),
        "model": {"vocab_size": 64, "d_model": 16, "max_seq_len": 32, "layers": layers},
        "data": {"path": "unused", "seq_len": 32},
        "train": {"steps": 10, "batch_tokens": 128, "micro_batch_size": 4, "precision": "fp32", "log_every": 2},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return RunConfig.model_validate(tree)


class StandIn(SimpleNamespace):
    """What callbacks see of a trainer."""


def stand_in(tmp_path: Path, *, rank: int = 0, step: int = 0, **sections: Any) -> Any:
    """A trainer that has done `step` steps of 128 tokens."""
    run = run_config(tmp_path, **sections)
    strategy = SimpleNamespace(
        rank=rank, world_size=1, device=torch.device("cpu"), name="single", model=torch.nn.Linear(1, 1),
        unsharded=lambda: nullcontext(torch.nn.Linear(1, 1)), autocast=nullcontext,
    )  # fmt: skip
    return StandIn(
        run=run, run_dir=tmp_path / run.name, strategy=strategy, step=step, tokens=128 * step, total_steps=10,
        total_tokens=1280, model_cost=run.model.cost(32), tokenizer=None, is_main=rank == 0,
        anomaly=AnomalyJudge(run.train.anomaly), parts=SimpleNamespace(config_hash="0123456789abcdef"),
    )  # fmt: skip


def step_out(step: int, **changes: Any) -> StepOut:
    """A step with distinct figures."""
    fields: dict[str, Any] = {
        "step": step, "tokens": 128 * step, "loss": 4.0 / (step + 1), "grad_norm": 0.1 * step, "lr": 1e-3 / 3,
        "n_valid": 120, "seconds": 0.5, "metrics": {},
    }  # fmt: skip
    return StepOut(**{**fields, **changes})


def do_step(
    trainer: Any, callbacks: list[Any], step: int, *, judged: tuple[float, float] | None = None, **changes: Any
) -> StepOut:
    """Call the hooks of one step in their order, as the trainer does. judged: loss and gradient norm for the judge."""
    for callback in callbacks:
        callback.before_optim(trainer, torch.tensor(1.0))
    if judged is not None:
        trainer.anomaly.judge(*judged)
    trainer.step, trainer.tokens = step, 128 * step
    out = step_out(step, **changes)
    for callback in callbacks:
        callback.on_step(trainer, out)
    return out
