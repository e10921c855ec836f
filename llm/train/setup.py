"""From a RunConfig to a Trainer: the parts, chosen and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.selftest import selftest
from llm.blocks.base import Caps, kernel_requests
from llm.checkpoint import Checkpointer
from llm.config.load import config_hash, config_text
from llm.core.errors import UserError
from llm.data.config import DataConfig
from llm.data.loader import Loader
from llm.parallel.mesh import find_place
from llm.train.callbacks import check_logging, default_callbacks
from llm.train.callbacks.environment import git_revision
from llm.train.config import RunConfig
from llm.train.loss import LanguageModelLoss
from llm.train.strategies import make_strategy
from llm.train.strategies.base import Strategy
from llm.train.trainer import Parts, Trainer


def with_tokenizer(run: RunConfig, vocab_size: int) -> RunConfig:
    """The run with the model's vocabulary size taken from the data, or checked against it."""
    given = run.model.vocab_size
    if given is None:
        return run.replace(model=run.model.replace(vocab_size=vocab_size))
    if given < vocab_size:
        raise UserError(
            f"model.vocab_size is {given}, but the data's tokenizer has {vocab_size} tokens; "
            f"leave model.vocab_size out, or give at least {vocab_size}"
        )
    return run


def check(run: RunConfig, world_size: int) -> None:
    """Combinations that no single section can see."""
    seq_len, batch_tokens = run.data.seq_len, run.train.batch_tokens
    if seq_len > run.model.max_seq_len and not any(w.restarts_positions() for w in run.model.wrappers):
        raise UserError(
            f"data.seq_len {seq_len} is beyond model.max_seq_len {run.model.max_seq_len}; lower one or raise the other"
        )
    if batch_tokens % seq_len:
        near = max(seq_len, round(batch_tokens / seq_len) * seq_len)
        raise UserError(
            f"train.batch_tokens {batch_tokens} is not a multiple of data.seq_len {seq_len}; "
            f"the nearest that is: {near}"
        )
    sequences = batch_tokens // seq_len
    if sequences % world_size and run.parallel.strategy != "single":
        raise UserError(
            f"train.batch_tokens {batch_tokens} is {sequences} sequences of {seq_len}, "
            f"which {world_size} processes cannot share "
            f"evenly; make it a multiple of {seq_len * world_size}"
        )
    if run.parallel.replicate > 1 and world_size % run.parallel.replicate:
        raise UserError(f"parallel.replicate {run.parallel.replicate} does not divide the {world_size} processes")


def check_held_out(run: RunConfig, loader: Loader) -> None:
    """Evaluation that was asked for needs something to evaluate on."""
    key = "every_steps" if run.eval.every_steps else "every_tokens"
    if getattr(run.eval, key) and not loader.has_split("valid"):
        raise UserError(
            f"eval.{key} is set, but the data have no held-out part (split valid); "
            f"prepare them with holdout, or remove eval.{key}"
        )


def check_packing(model: nn.Module, data: DataConfig) -> None:
    """A model that cannot keep packed documents apart needs rows of one document each."""
    if data.packing == "pad" or not data.isolate:
        return
    for module in model.modules():
        if not getattr(module, "caps", Caps()).packing:
            raise UserError(
                f"{type(module).__name__} cannot keep documents that share a row apart, and data.packing is "
                f"{data.packing!r}; set data.packing=pad (one document per row), or data.isolate=false (documents that "
                "share a row are read as one)"
            )


def build_trainer(run: RunConfig) -> Trainer:
    """Everything a run needs, ready for `fit`. Nothing is written but the folder of its checkpoints."""
    if run.train.num_threads is not None:
        torch.set_num_threads(run.train.num_threads)
    if run.train.deterministic:
        torch.use_deterministic_algorithms(True)
    check(run, find_place(run.train.device).world_size)
    strategy = make_strategy(run)
    try:
        loader = make_loader(run, strategy, split="train")
        run = with_tokenizer(run, loader.vocab_size)
        check_logging(run, strategy.device, has_tokenizer=loader.tokenizer is not None)
        check_held_out(run, loader)
        torch.manual_seed(run.seed * 1_000_003 + strategy.rank)
        model = run.model.build("meta")
        check_packing(model, run.data)
        strategy.setup(model, run, run.seed)
        dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
        selftest(kernel_requests(strategy.model, strategy.device, dtype), strategy.device)
        return Trainer(run, make_parts(run, strategy, loader))
    except BaseException:
        strategy.close()
        raise


def make_loader(run: RunConfig, strategy: Strategy, *, split: str) -> Loader:
    """The loader of a split for this rank."""
    training = split == "train"
    return Loader(
        run.data,
        split=split,
        sequences_per_step=run.train.batch_tokens // run.data.seq_len
        if training
        else run.train.micro_batch_size * strategy.world_size,
        micro_batch_size=run.train.micro_batch_size,
        rank=strategy.rank,
        world_size=strategy.world_size,
        seed=run.seed,
    )


def make_parts(run: RunConfig, strategy: Strategy, loader: Any) -> Parts:
    """The standard parts of a language-model run."""
    callbacks, signals = default_callbacks(run)
    token_bytes = loader.tokenizer.token_bytes() if loader.tokenizer is not None else None
    return Parts(
        strategy=strategy,
        loader=loader,
        loss=LanguageModelLoss(run.train.z_loss, run.train.loss_chunk),
        checkpointer=Checkpointer(
            Path(run.runs_dir) / run.name / "checkpoints",
            keep=run.checkpoint.keep,
            asynchronous=run.checkpoint.asynchronous,
            config_yaml=config_text(run),
        ),
        callbacks=callbacks,
        validation=(lambda: make_loader(run, strategy, split="valid")) if loader.has_split("valid") else None,
        token_bytes=None if token_bytes is None else torch.as_tensor(token_bytes),
        tokenizer=loader.tokenizer,
        model_cost=run.model.cost(run.data.seq_len),
        signal_requested=signals,
        config_hash=config_hash(run),
        git_revision=git_revision(),
    )
