"""A tiny model trained for some steps under any strategy, for the tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from llm.core import aux_loss
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.train.config import OptimConfig, ParallelConfig, TrainConfig
from llm.train.strategies import NamedState, Strategy, make_strategy

VOCAB, LENGTH, SEQUENCES = 61, 16, 8
"""A vocabulary that no number of ranks divides."""
CLIP = 0.5


def tiny_run(
    *, optim: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, train: dict[str, Any] | None = None
) -> Any:
    """The sections of a RunConfig that a strategy reads."""
    return SimpleNamespace(
        train=TrainConfig(
            **{"steps": 10, "batch_tokens": SEQUENCES * LENGTH, "precision": "fp32", "device": "cpu", **(train or {})}
        ),
        optim=OptimConfig(**{"lr": 3e-3, **(optim or {})}),
        parallel=ParallelConfig(**(parallel or {})),
    )


def tiny_model(*, tied: bool = True, channel: Any = "swiglu", dropout: float = 0.0) -> ModelConfig:
    """Two layers of width 32."""
    block = {"mixer": {"type": "attention", "n_heads": 4, "n_kv_heads": 2}, "channel": channel}
    return ModelConfig.model_validate(
        {
            "vocab_size": VOCAB, "d_model": 32, "max_seq_len": LENGTH, "dropout": dropout,
            "layers": [{"pattern": [block], "repeat": 2}], "head": {"tied": tied},
        }
    )  # fmt: skip


def step_tokens(step: int) -> torch.Tensor:
    """[SEQUENCES, LENGTH + 1] tokens of a step with something to learn: each row counts up by its own stride."""
    rng = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(VOCAB, (SEQUENCES, 1), generator=rng)
    stride = torch.randint(1, 4, (SEQUENCES, 1), generator=rng)
    return (start + stride * torch.arange(LENGTH + 1)) % VOCAB


def valid_labels(tokens: torch.Tensor, first_row: int) -> torch.Tensor:
    """Labels of rows, of which later rows leave more out, so that ranks and microbatches differ in their counts."""
    labels = tokens[:, 1:].clone()
    for row in range(len(labels)):
        labels[row, : first_row + row] = -100
    return labels


def train_steps(
    strategy: Strategy, steps: int, accumulation: int, *, first: int = 0
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of `steps` optimizer steps on this rank's rows, cut into `accumulation` microbatches."""
    rows = SEQUENCES // strategy.world_size
    losses, norms = [], []
    for step in range(first, first + steps):
        mine = range(strategy.rank * rows, (strategy.rank + 1) * rows)
        tokens = step_tokens(step)[mine.start : mine.stop]
        labels = valid_labels(tokens, mine.start)
        count = strategy.all_reduce((labels != -100).sum().float())
        total = torch.zeros(())
        size = rows // accumulation
        for index in range(accumulation):
            part = slice(index * size, (index + 1) * size)
            x, y = tokens[part, :-1], labels[part]
            with strategy.accumulate(last=index == accumulation - 1):
                with strategy.autocast():
                    hidden = strategy.model(x, SeqInfo.contiguous(*x.shape)).hidden
                    logits = strategy.model.head(hidden).float()
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")
                with aux_loss.scale((y != -100).sum() / count):
                    strategy.backward(loss / count)
            aux_loss.take_values()
            total += loss.detach()
        norms.append(float(strategy.clip(CLIP)))
        strategy.step(min(1.0, (step + 1) / 4), skip=False)
        losses.append(float(strategy.all_reduce(total) / count))
    return losses, norms


def start(run: Any, model: ModelConfig) -> Strategy:
    """A strategy that is ready to train."""
    strategy = make_strategy(run)
    strategy.setup(model.build("meta"), run, seed=7)
    return strategy


def plain(state: NamedState) -> NamedState:
    """A copy of a state in whole tensors that any process can take."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return full.detach().cpu().clone()

    optim = {name: {key: whole(t) for key, t in entry.items()} for name, entry in state.optim.items()}
    return NamedState({name: whole(t) for name, t in state.model.items()}, optim)


def train_and_state(rank: int, run: Any, model: ModelConfig, steps: int) -> NamedState:
    """For `run_ranks`: the state after `steps` steps."""
    strategy = start(run, model)
    train_steps(strategy, steps, 1)
    return plain(strategy.state())


def load_and_train(rank: int, run: Any, model: ModelConfig, state: NamedState, first: int, steps: int) -> list[float]:
    """For `run_ranks`: losses of the steps that follow a loaded state."""
    strategy = start(run, model)
    strategy.load(state)
    return train_steps(strategy, steps, 1, first=first)[0]


def losses_and_norms(
    rank: int, run: Any, model: ModelConfig, steps: int, accumulation: int
) -> tuple[list[float], list[float]]:
    """For `run_ranks`: train from the start."""
    strategy = start(run, model)
    return train_steps(strategy, steps, accumulation)
