"""Small byte-level language models on the source of Python's own library, to compare blocks with in minutes.

Training runs in this process, in fp32 on the CPU, with AdamW and a cosine schedule; the same seed gives the same
batches to every model.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.base import after_step
from llm.core.init import initialise
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.train.config import OptimConfig, ParamGroupConfig
from llm.train.optim import build_optimizer
from llm.train.strategies.common import named_tensors

HELD_OUT = 16
"""One file in this many is held out, chosen by the hash of its path."""


@dataclass(frozen=True)
class Corpus:
    """Bytes [N] uint8 of the files to train on and of those held out."""

    train: Tensor
    held: Tensor


def library(max_bytes: int = 8_000_000) -> Corpus:
    """The modules of the running Python's library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    size = 0
    for path in files:
        name = path.relative_to(root).as_posix()
        held = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % HELD_OUT == 0
        text = path.read_bytes()
        parts[held].append(text)
        size += len(text)
        if size >= max_bytes:
            break
    train, held_out = (
        torch.frombuffer(bytearray(b"\n".join(parts[held])), dtype=torch.uint8) for held in (False, True)
    )
    return Corpus(train, held_out)


@dataclass(frozen=True)
class Recipe:
    """steps of `batch` rows of seq_len bytes; lr: peak after `warmup` steps, then a cosine down to a tenth of it."""

    steps: int = 300
    batch: int = 16
    seq_len: int = 128
    lr: float = 2e-3
    warmup: int = 30
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def decoder(mixer: dict[str, Any], *, d_model: int, n_layers: int, max_seq_len: int, **changes: Any) -> ModelConfig:
    """A byte-level decoder of one mixer and SwiGLU."""
    block = {"mixer": mixer, "channel": "swiglu"}
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "d_model": d_model,
        "max_seq_len": max_seq_len,
        "layers": [{"pattern": [block], "repeat": n_layers}],
    }
    return ModelConfig.model_validate(fields | changes)


@dataclass(frozen=True)
class Fitted:
    """losses: nats per byte of each training step. seconds: of training."""

    model: Any
    losses: list[float]
    seconds: float


def fit(
    config: ModelConfig,
    corpus: Corpus,
    recipe: Recipe,
    seed: int,
    *,
    start: dict[str, Tensor] | None = None,
    groups: list[ParamGroupConfig] | None = None,
    on_step: Callable[[int, Any], None] | None = None,
) -> Fitted:
    """Train a model, from scratch or from the parameters and buffers `start`. Vectors are not decayed.

    groups: settings for some parameters, as in `optim.groups` of a run; the optimizer is then that of a run.
    on_step(step, model) is called after each step.
    """
    model = config.build("cpu")
    initialise(model, seed)
    if start is not None:
        live = named_tensors(model)
        assert set(live) == set(start)
        for name, tensor in live.items():
            tensor.copy_(start[name])
    step_at = _optimizer(model, recipe) if groups is None else _grouped_optimizer(model, recipe, groups)
    rng = torch.Generator().manual_seed(seed)
    losses = []
    started = time.perf_counter()
    for step in range(recipe.steps):
        first = torch.randint(len(corpus.train) - recipe.seq_len, (recipe.batch, 1), generator=rng)
        rows = corpus.train[first + torch.arange(recipe.seq_len + 1)].long()
        before_step(model, Progress(step, recipe.steps, seed))
        loss = _loss(model, rows).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        step_at(recipe.rate(step))
        model.zero_grad()
        after_step(model)
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, model)
            model.train()
    return Fitted(model, losses, time.perf_counter() - started)


def _optimizer(model: Any, recipe: Recipe) -> Callable[[float], None]:
    """A function that takes a step at a learning rate."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))

    def step_at(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    return step_at


def _grouped_optimizer(model: Any, recipe: Recipe, groups: list[ParamGroupConfig]) -> Callable[[float], None]:
    settings = OptimConfig(lr=recipe.lr, weight_decay=recipe.weight_decay, groups=groups)
    optimizer = build_optimizer(model, settings)
    return lambda rate: optimizer.step(rate / recipe.lr)


def _loss(model: Any, rows: Tensor) -> Tensor:
    """[B, T] nats per byte of rows [B, T + 1]."""
    hidden = model(rows[:, :-1], SeqInfo.contiguous(rows.shape[0], rows.shape[1] - 1)).hidden
    return F.cross_entropy(model.head(hidden).float().transpose(1, 2), rows[:, 1:], reduction="none")


@torch.no_grad()
def score(model: Any, corpus: Corpus, seq_len: int, n_bytes: int = 32_768) -> Tensor:
    """[seq_len] nats per held-out byte by its place in the row, over rows that lie beside one another."""
    model.eval()
    n_rows = min(n_bytes, len(corpus.held) - 1) // seq_len
    rows = corpus.held[: n_rows * seq_len + 1].long().unfold(0, seq_len + 1, seq_len)
    batch = max(1, 8192 // seq_len)
    return torch.cat([_loss(model, part) for part in rows.split(batch)]).mean(0)
