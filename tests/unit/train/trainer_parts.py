"""Parts for a trainer in a test: a loader, a recorder, a strategy around a given module, and what to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm.checkpoint import Checkpointer
from llm.core.batch import IGNORE, Microbatch, StepBatch
from llm.core.seq import SeqInfo
from llm.parallel.mesh import Place
from llm.train.callbacks.base import Callback, StepOut
from llm.train.config import RunConfig
from llm.train.loss import LanguageModelLoss
from llm.train.optim import build_optimizer
from llm.train.strategies.single import SingleStrategy
from llm.train.trainer import Parts, Trainer
from tests.unit.train.helpers import run_config

VOCAB, LENGTH, ROWS = 64, 32, 4


def rows_of(step: int, n: int = ROWS) -> tuple[Tensor, Tensor]:
    """(tokens, labels), both [n, LENGTH], of a step; row r leaves 5 * r labels out, at its end."""
    rng = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCAB, (n, LENGTH + 1), generator=rng)
    labels = ids[:, 1:].clone()
    for row in range(n):
        labels[row, LENGTH - 5 * row :] = IGNORE
    return ids[:, :-1], labels


def step_batch(tokens: Tensor, labels: Tensor, sizes: list[int]) -> StepBatch:
    """The rows cut into microbatches of these sizes."""
    parts = zip(tokens.split(sizes), labels.split(sizes), strict=True)
    return StepBatch([Microbatch(x, y, SeqInfo.contiguous(*x.shape)) for x, y in parts], tokens.numel())


class Steps:
    """An endless loader of `rows_of` that passes over `without`; `current` is the step whose batch was given last."""

    def __init__(self, sizes: list[int] | None = None, without: tuple[int, ...] = ()) -> None:
        self.sizes, self.without = sizes or [ROWS], without
        self.next, self.current = 0, -1

    def __iter__(self) -> Iterator[StepBatch]:
        while True:
            while self.next in self.without:
                self.next += 1
            self.current, self.next = self.next, self.next + 1
            yield step_batch(*rows_of(self.current), self.sizes)

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def load(self, state: dict[str, Any]) -> None:
        self.next = state["next"]

    def fingerprint(self) -> str:
        return "steps"


class Recorder(Callback):
    """What happened, and the gradients of each step."""

    def __init__(self, during: Callable[[Trainer, StepOut], None] = lambda t, out: None) -> None:
        self.outs: list[StepOut] = []
        self.evals: list[dict[str, float]] = []
        self.grads: list[dict[str, Tensor]] = []
        self.saved: list[tuple[int, str]] = []
        self.errors: list[BaseException] = []
        self.during = during

    def before_optim(self, trainer: Trainer, grad_norm: Tensor) -> None:
        self.grads.append(
            {name: p.grad.clone() for name, p in trainer.strategy.model.named_parameters() if p.grad is not None}
        )

    def on_step(self, trainer: Trainer, out: StepOut) -> None:
        self.outs.append(out)
        self.during(trainer, out)

    def on_eval(self, trainer: Trainer, result: dict[str, float]) -> None:
        self.evals.append(result)

    def on_saved(self, trainer: Trainer, info: Any) -> None:
        self.saved.append((info.step, info.kind))

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.errors.append(error)

    @property
    def losses(self) -> list[float]:
        return [out.loss for out in self.outs]


class Given(SingleStrategy):
    """The single strategy around a module that exists already; keeps the factors it was stepped with."""

    def __init__(self, model: nn.Module, run: RunConfig) -> None:
        super().__init__(Place(0, 0, 1, torch.device("cpu")))
        self.model = self.bare = model
        self.optimizer = build_optimizer(model, run.optim)
        self.factors: list[float] = []

    def step(self, lr_factor: float, skip: bool) -> None:
        self.factors.append(lr_factor)
        super().step(lr_factor, skip)


def make(
    tmp_path: Path, *, model: nn.Module | None = None, loader: Any = None, loss: Any = None, **rest: Any
) -> tuple[Trainer, Recorder]:
    """A trainer of the small model, and its recorder; sections of the run and fields of Parts by keyword."""
    sections = {
        name: rest.pop(name)
        for name in ("train", "optim", "schedule", "checkpoint", "eval", "model_section")
        if name in rest
    }
    if "model_section" in sections:
        sections["model"] = sections.pop("model_section")
    run = run_config(tmp_path, **sections)
    recorder = rest.pop("recorder", None) or Recorder()
    if model is None:
        strategy: SingleStrategy = SingleStrategy(Place(0, 0, 1, torch.device("cpu")))
        strategy.setup(run.model.build("meta"), run, run.seed)
    else:
        strategy = Given(model, run)
    parts = Parts(
        strategy=strategy,
        loader=loader or Steps(),
        loss=loss or LanguageModelLoss(run.train.z_loss, run.train.loss_chunk),
        checkpointer=Checkpointer(tmp_path / run.name / "checkpoints", asynchronous=run.checkpoint.asynchronous),
        callbacks=[recorder, *rest.pop("callbacks", [])],
        **rest,
    )
    return Trainer(run, parts), recorder


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.strategy.state().model.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def exact(
    trainer: Trainer, tokens: Tensor, labels: Tensor, z_loss: float = 0.0
) -> tuple[float, float, dict[str, Tensor]]:
    """(mean cross-entropy, what is trained on, gradients) of all rows at once in float64, written out."""
    model = copy.deepcopy(trainer.strategy.model).double()
    model.zero_grad()
    logits = model.head(model(tokens, SeqInfo.contiguous(*tokens.shape)).hidden)
    log_z = logits.logsumexp(-1)
    valid = labels != IGNORE
    picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nll = (log_z - picked)[valid].sum() / valid.sum()
    total = nll + z_loss * log_z[valid].square().sum() / valid.sum()
    total.backward()
    return (
        float(nll.detach()),
        float(total.detach()),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )
