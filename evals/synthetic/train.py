"""The common small trainer of synthetic tasks: a decoder, fresh examples at every step, AdamW, one process."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from evals.synthetic.base import Examples, TaskConfig, TokenTask, VectorTask, accuracy, squared_error
from llm.blocks.base import after_step
from llm.blocks.linears.dense import DenseLinear
from llm.config.base import Config, Count
from llm.core import aux_loss
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.train.config import OptimConfig, ScheduleConfig
from llm.train.optim import build_optimizer
from llm.train.optim.schedule import lr_factor


class TrainSettings(Config):
    """steps: at most; batch: examples of a step. optimizer: muon drives matrices at lr, the rest by AdamW at adam_lr
    (None: lr). lr: peak learning rate, risen over warmup (a share of the steps), then a cosine to a tenth. stop_at: end
    as soon as the accuracy (or, for vectors, the error) is as good; looked at every eval_every steps on eval_examples
    held-out examples. lengths: numbers of positions to which the trained model is also put, without further training.
    """

    steps: Count = Field(2000, ge=1)
    batch: int = Field(64, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-3, gt=0)
    adam_lr: float | None = Field(None, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float | None = Field(1.0, gt=0)
    stop_at: float | None = None
    eval_every: int = Field(100, ge=1)
    eval_examples: int = Field(512, ge=1)
    lengths: list[Count] = []
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _no_dead_keys(self) -> TrainSettings:
        if self.adam_lr is not None and self.optimizer != "muon":
            raise UserError("train.adam_lr has no effect with train.optimizer=adamw; remove it or set it to muon")
        return self


class VectorModel(nn.Module):
    """A decoder between a linear read-in [B, T, Din] -> [B, T, D] and a linear read-out [B, T, D] -> [B, T, Do]."""

    def __init__(self, config: ModelConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        d = config.d_model
        self.read_in = DenseLinear(d_in, d, bias=True, std=d_in**-0.5, init=config.init)
        self.decoder = config.build("cpu")
        self.read_out = DenseLinear(d, d_out, bias=True, std=d**-0.5, init=config.init)

    def blocks(self) -> Any:
        """(dotted name, block), as a decoder's."""
        for name, block in self.decoder.blocks():
            yield f"decoder.{name}", block


@dataclass
class Fitted:
    """A trained model and what came of it. history: (step, training loss, metric)."""

    model: nn.Module
    scores: dict[str, Any]
    by_length: dict[int, dict[str, Any]]
    history: list[tuple[int, float, float]]
    steps: int
    cpu_seconds: float


def metric_name(task: TaskConfig) -> str:
    """The one figure of a task."""
    return "accuracy" if isinstance(task, TokenTask) else "error"


def model_for(config: ModelConfig, task: TaskConfig, settings: TrainSettings) -> ModelConfig:
    """The model for a task: its number of token ids, and room for the longest sequence."""
    n_ids = task.n_ids if isinstance(task, TokenTask) else 2
    longest = max([task.n_positions, *settings.lengths])
    return config.replace(vocab_size=n_ids, max_seq_len=longest)


def build(config: ModelConfig, task: TaskConfig, seed: int, device: torch.device) -> nn.Module:
    """The model with its starting values."""
    model: nn.Module = (
        VectorModel(config, task.d_in, task.d_out) if isinstance(task, VectorTask) else config.build("cpu")
    )
    initialise(model, seed)
    return model.to(device)


def fit(
    task: TaskConfig,
    config: ModelConfig,
    settings: TrainSettings,
    seed: int,
    *,
    label: str = "",
    model: nn.Module | None = None,
) -> Fitted:
    """Train a model on a task; progress goes to stderr. The same arguments give the same result on the same machine.

    model: one of the same config, made for as long sequences, to go on with, as in a curriculum; None: a new one.
    """
    device = _device(settings.device)
    torch.manual_seed(seed)
    model = (build(config, task, seed, device) if model is None else model).train()
    optim = OptimConfig(
        type=settings.optimizer,
        lr=settings.lr,
        adam_lr=settings.adam_lr,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.98),
    )
    optimizer = build_optimizer(model, optim, precision=settings.precision)
    schedule = ScheduleConfig(type="cosine", warmup_fraction=settings.warmup, min_ratio=0.1)
    history: list[tuple[int, float, float]] = []
    started = time.process_time()
    seconds, step, loss_value = 0.0, 0, math.nan
    scores: dict[str, Any] = {}
    for step in range(1, settings.steps + 1):
        examples = task.examples(seed, "train", (step - 1) * settings.batch, settings.batch)
        before_step(model, Progress(step - 1, settings.steps, seed))
        with _autocast(device, settings.precision):
            loss = _loss(model, examples, device)
        loss.backward()
        aux_loss.take_values()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step(lr_factor(schedule, step - 1, settings.steps, 1))
        after_step(model)
        optimizer.zero_grad()
        if step % settings.eval_every == 0 or step == settings.steps:
            seconds += time.process_time() - started
            loss_value = float(loss.detach())
            scores = evaluate(model, task, settings, seed, device)
            value = scores[metric_name(task)]
            history.append((step, loss_value, value))
            print(f"{label} step {step}: loss {loss_value:.4f}, {metric_name(task)} {value:.4f}", file=sys.stderr)
            started = time.process_time()
            if not math.isfinite(loss_value) or _good_enough(task, settings, value):
                break
    longer = {length: evaluate(model, task.longer(length), settings, seed, device) for length in settings.lengths}
    return Fitted(model, scores, longer, history, step, seconds)


def _good_enough(task: TaskConfig, settings: TrainSettings, value: float) -> bool:
    if settings.stop_at is None:
        return False
    return value >= settings.stop_at if isinstance(task, TokenTask) else value <= settings.stop_at


@torch.no_grad()
def evaluate(
    model: nn.Module, task: TaskConfig, settings: TrainSettings, seed: int, device: torch.device
) -> dict[str, Any]:
    """Scores on held-out examples: of `accuracy` for tokens, of `squared_error` for vectors."""
    model.eval()
    examples = task.examples(seed, "valid", 0, settings.eval_examples)
    rows = max(1, settings.batch * 64 // max(64, task.n_positions))
    outputs = []
    for start in range(0, len(examples), rows):
        part = torch.from_numpy(examples.inputs[start : start + rows]).to(device)
        with _autocast(device, settings.precision):
            outputs.append(predict(model, part).cpu())
    model.train()
    aux_loss.take_values()
    predictions = torch.cat(outputs).numpy()
    return accuracy(predictions, examples) if isinstance(task, TokenTask) else squared_error(predictions, examples)


def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """The likeliest token [B, T], or the vector [B, T, Do], at each position."""
    seq = SeqInfo.contiguous(*inputs.shape[:2], device=inputs.device)
    if isinstance(model, VectorModel):
        return model.read_out(model.decoder(model.read_in(inputs), seq).hidden).float()
    return model.head(model(inputs, seq).hidden).argmax(dim=-1)  # type: ignore[operator]


def _loss(model: nn.Module, examples: Examples, device: torch.device) -> Tensor:
    """Mean over what is asked, of every hidden state that the model wants trained, each with its weight."""
    inputs = torch.from_numpy(examples.inputs).to(device)
    answers = torch.from_numpy(examples.answers).to(device)
    asked = torch.from_numpy(examples.asked).to(device)
    seq = SeqInfo.contiguous(*inputs.shape[:2], device=device)
    vectors = isinstance(model, VectorModel)
    output = model.decoder(model.read_in(inputs), seq) if vectors else model(inputs, seq)  # type: ignore[operator]
    total = torch.zeros((), device=device)
    for hidden, weight in ((output.hidden, output.weight), *output.extra):
        wanted = hidden[asked]
        if vectors:
            loss = (model.read_out(wanted).float() - answers[asked]).square().mean()  # type: ignore[operator]
        else:
            loss = model.cross_entropy(wanted, answers[asked]).total / len(wanted)  # type: ignore[operator]
        total = total + weight * loss
    return total


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here; use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
