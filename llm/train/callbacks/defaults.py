"""The callbacks that a run's config asks for."""

from __future__ import annotations

import torch

from llm.core.errors import UserError
from llm.train.callbacks.base import Callback
from llm.train.callbacks.collector import GarbageCollection
from llm.train.callbacks.console import Console
from llm.train.callbacks.diagnostics import MemorySnapshot, Profiler
from llm.train.callbacks.jsonl import JsonlWriter
from llm.train.callbacks.report import Report
from llm.train.callbacks.samples import Samples
from llm.train.callbacks.signals import Signals
from llm.train.callbacks.sinks import TensorBoard, WeightsAndBiases, require
from llm.train.callbacks.throughput import Memory, Throughput
from llm.train.config import RunConfig


def check_logging(run: RunConfig, device: torch.device | str, *, has_tokenizer: bool = True) -> None:
    """UserError when a key of `log` cannot be honoured on this machine; called before anything is built."""
    log = run.log
    if log.tensorboard:
        require("tensorboard", "log.tensorboard")
    if log.wandb:
        require("wandb", "log.wandb")
    if log.memory_snapshot and torch.device(device).type != "cuda":
        raise UserError("log.memory_snapshot=true needs CUDA; this run is on a CPU: set log.memory_snapshot=false")
    if log.profile_steps is not None and not 1 <= log.profile_steps[0] <= log.profile_steps[1]:
        raise UserError(
            f"log.profile_steps is [first, last] with 1 <= first <= last; given {list(log.profile_steps)}: "
            "write e.g. [10, 12]"
        )
    if log.sample_every_steps and not has_tokenizer:
        raise UserError("log.sample_every_steps needs a tokenizer, and there is none; remove it")


def default_callbacks(run: RunConfig) -> tuple[list[Callback], Signals]:
    """All callbacks of a run, and the one among them that says whether a signal asked to stop."""
    log = run.log
    throughput, jsonl = Throughput(), JsonlWriter()
    console = Console(throughput, progress=log.progress)
    signals = Signals()
    callbacks: list[Callback] = [signals, GarbageCollection(), throughput, Memory(), jsonl, console]
    if log.profile_steps is not None:
        callbacks.append(Profiler(*log.profile_steps))
    if log.memory_snapshot:
        callbacks.append(MemorySnapshot())
    if log.tensorboard:
        callbacks.append(TensorBoard())
    if log.wandb:
        callbacks.append(WeightsAndBiases())
    if log.sample_every_steps:
        callbacks.append(Samples(log.sample_every_steps, log.sample_prompt, log.sample_tokens, jsonl, console))
    if log.report:
        callbacks.append(Report(console))
    return callbacks, signals
