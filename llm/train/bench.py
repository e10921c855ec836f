"""Measuring the speed of training: the whole trainer with loader, metrics and checkpoints, on random tokens.

Each result is one flat record with its conditions. A peer, transformers with torch.compile, can be measured on the same
shapes in the same process.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field

from llm.config.base import Config, Count
from llm.core.errors import UserError, unknown_name
from llm.data.store import write_store
from llm.models.config import ModelConfig
from llm.train.callbacks.base import Callback, StepOut
from llm.train.callbacks.console import Console
from llm.train.callbacks.environment import git_revision, versions
from llm.train.callbacks.jsonl import encode
from llm.train.callbacks.report import Report
from llm.train.callbacks.throughput import hardware_flops_per_token, training_flops_per_token
from llm.train.config import RunConfig
from llm.train.hardware import cpu_name, device_name, num_cores, peak_flops, peak_memory

_TINY_BLOCK = {"mixer": {"type": "attention", "n_heads": 4}, "channel": {"type": "swiglu", "d_hidden": 176}}
_TINY = {"vocab_size": 512, "d_model": 64, "layers": [{"pattern": [_TINY_BLOCK], "repeat": 2}]}
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny": (_TINY, 64, 4),
    "llama-124m": ({"variant": "bench-llama-124m"}, 2048, 16),
    "llama-360m": ({"variant": "bench-llama-360m"}, 4096, 8),
    "llama-1.3b": ({"variant": "bench-llama-1.3b"}, 4096, 4),
}
"""Name -> (model section, default sequence length, default sequences of a step)."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class BenchConfig(Config):
    """What to measure. None: as fits the machine (CUDA: the three Llama shapes, compiled, bf16; CPU: `tiny`, fp32).

    batch: sequences of one step, all in one microbatch unless micro_batch_size says otherwise. checkpoint: save once
    amid the timed steps, in the background. verify: repeat the first steps in fp32 with reference kernels, eager and
    row by row, and compare the losses. peer: measure transformers with torch.compile too. tolerance: largest relative
    difference of losses that passes (None: 0.01 in bf16, 1e-4 in fp32).
    """

    shapes: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    seq_len: Count | None = Field(None, ge=2)
    batch: int | None = Field(None, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    steps: int = Field(30, ge=2)
    warmup: int = Field(10, ge=1)
    precision: Literal["fp32", "bf16"] | None = None
    compile: bool | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    loss_chunk: Count | None = Field(None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint: bool = True
    verify: bool = True
    peer: Literal["none", "transformers"] = "none"
    tolerance: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)


def bench_train(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One record per shape and implementation, as each is measured. What fails gives a record with `error`."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    names = config.shapes or (["llama-124m", "llama-360m", "llama-1.3b"] if cuda else ["tiny"])
    for name in names:
        if name not in SHAPES:
            raise UserError(unknown_name("shape", name, SHAPES))
    device = torch.device("cuda" if cuda else "cpu")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="manyformer-bench-") as folder:
            run = make_run(config, name, Path(folder), cuda)
            yield _guarded(_measure_own, config, run, "manyformer", device)
            if config.peer == "transformers":
                yield _guarded(_measure_peer, config, run, "transformers", device)


def make_run(config: BenchConfig, shape: str, folder: Path, cuda: bool) -> RunConfig:
    """The run that is timed, and its data: random tokens over the whole vocabulary, enough for one pass."""
    section, seq_len, batch = SHAPES[shape]
    seq_len, batch = config.seq_len or seq_len, config.batch or batch
    model = ModelConfig.model_validate(section | {"max_seq_len": seq_len})
    total = config.warmup + config.steps
    write_random_data(folder / "data", model.required_vocab_size(), total * batch * seq_len + 1, config.seed)
    save_at = config.warmup + config.steps // 2
    tree = {
        "name": shape,
        "seed": config.seed,
        "runs_dir": str(folder / "runs"),
        "model": model.to_dict(),
        "data": {
            "path": str(folder / "data" / "train"),
            "tokenizer": str(folder / "data" / "tokenizer"),
            "seq_len": seq_len,
            "isolate": False,
        },
        "train": {
            "steps": total,
            "batch_tokens": batch * seq_len,
            "micro_batch_size": config.micro_batch_size or batch,
            "precision": config.precision or ("bf16" if cuda else "fp32"),
            "compile": cuda if config.compile is None else config.compile,
            "activation_checkpointing": config.activation_checkpointing,
            "loss_chunk": config.loss_chunk,
            "device": "cuda" if cuda else "cpu",
        },
        "optim": {"type": "adamw", "lr": 3e-4},
        "schedule": {"type": "constant"},
        "checkpoint": {"every_steps": save_at if config.checkpoint else None, "resume": "never"},
        "eval": {"at_end": False},
        "log": {"report": False, "progress": False},
    }
    return RunConfig.model_validate(tree)


def write_random_data(folder: Path, vocab_size: int, num_tokens: int, seed: int) -> None:
    """A token store of documents of 1,000 uniformly random ids, and a tokenizer with as many tokens."""
    from llm.data.tokenizer.simple import CharsTokenizer

    rng = np.random.default_rng(seed)
    lengths = [1000] * (num_tokens // 1000) + [num_tokens % 1000 + 1]
    folder.mkdir(parents=True)
    write_store(folder / "train", (rng.integers(0, vocab_size, length) for length in lengths), vocab_size)
    # Any alphabet of the right size will do; this range of code points is free of surrogates.
    CharsTokenizer(chr(0x20000 + i) for i in range(vocab_size - 1)).save(folder / "tokenizer")


Measure = Callable[[BenchConfig, RunConfig, torch.device], dict[str, Any]]


def _guarded(measure: Measure, config: BenchConfig, run: RunConfig, name: str, device: torch.device) -> dict[str, Any]:
    """The measurement, or a record that says why there is none: one shape that does not fit must not end the others."""
    try:
        record = measure(config, run, device)
    except (torch.OutOfMemoryError, RuntimeError, ImportError, UserError) as error:
        record = {"error": f"{type(error).__name__}: {error}"[:600], "correct": False}
    _release(device)
    return {"bench": "train", "shape": run.name, "implementation": name} | record | conditions(run, device)


def _release(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def conditions(run: RunConfig, device: torch.device) -> dict[str, Any]:
    """What a figure depends on."""
    found: dict[str, Any] = {
        "seq_len": run.data.seq_len,
        "batch": run.train.batch_tokens // run.data.seq_len,
        "micro_batch_size": run.train.micro_batch_size,
        "vocab_size": run.model.vocab_size,
        "d_model": run.model.d_model,
        "n_layers": run.model.n_layers,
        "precision": run.train.precision,
        "compile": run.train.compile,
        "activation_checkpointing": run.train.activation_checkpointing,
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "num_cores": num_cores(),
        "num_threads": torch.get_num_threads(),
        "clock_mhz": _clock(device),
        "peak_flops": peak_flops(device_name(device)),
        "git_revision": git_revision(),
    }
    return found | {"versions": versions()}


def _clock(device: torch.device) -> int | None:
    """The GPU's clock now, where the driver's library is installed."""
    if device.type != "cuda":
        return None
    try:
        return int(torch.cuda.clock_rate(device))
    except (ImportError, RuntimeError):
        return None


class StepTimer(Callback):
    """Wall time from the end of one step to the end of the next, all callbacks and the loader included."""

    order: ClassVar[int] = 1000

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def on_start(self, trainer: Any) -> None:
        self.ends = [time.perf_counter()]

    def on_step(self, trainer: Any, out: StepOut) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(out.loss)
        self.peak = peak_memory(trainer.strategy.device)


def _measure_own(config: BenchConfig, run: RunConfig, device: torch.device) -> dict[str, Any]:
    timer = StepTimer()
    train(run, timer)
    saved_at = run.checkpoint.every_steps
    record = _speed(config, run, timer, device, saved_at)
    record["parameters"] = run.model.cost(run.data.seq_len).total.params
    _release(device)
    return record | (verdict(config, run, timer.losses, device) if config.verify else _finite(timer.losses))


def train(run: RunConfig, timer: StepTimer, *, steps: int | None = None) -> None:
    """Run the trainer as `launch/train.py` does, with its callbacks and a timer, but without a display."""
    from llm.train.setup import build_trainer

    trainer = build_trainer(run)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, (Console, Report))] + [timer]
    if steps is not None:
        trainer.total_steps = steps
    try:
        trainer.fit()
    finally:
        trainer.strategy.close()


def _speed(
    config: BenchConfig, run: RunConfig, timer: StepTimer, device: torch.device, saved_at: int | None
) -> dict[str, Any]:
    seconds = [after - before for before, after in zip(timer.ends, timer.ends[1:])]
    # Step k ends interval k - 1; what is saved after step k falls into the next interval.
    timed = {index: s for index, s in enumerate(seconds) if index >= config.warmup}
    plain = [s for index, s in timed.items() if saved_at is None or index != saved_at]
    tokens = run.train.batch_tokens
    return _figures(run, device, tokens / statistics.fmean(plain)) | {
        "tokens_per_second_with_save": tokens * len(timed) / sum(timed.values()),
        "step_ms_median": 1e3 * statistics.median(plain),
        "step_ms_max": 1e3 * max(plain),
        "first_step_seconds": seconds[0],
        "steps": len(plain),
        "peak_memory_gib": timer.peak / 2**30,
    }


def _figures(run: RunConfig, device: torch.device, speed: float) -> dict[str, Any]:
    """Speed and what part of the device's peak it is, with causal attention counted half and in full."""
    cost = run.model.cost(run.data.seq_len)
    peak = peak_flops(device_name(device))
    flops = training_flops_per_token(cost)
    length = run.data.seq_len
    other_half = 3 * cost.total.attention_flops * (2 * length / (length + 1) - 1)
    return {
        "tokens_per_second": speed,
        "mfu": speed * flops / peak,
        "mfu_full_attention": speed * (flops + other_half) / peak,
        "hfu": speed * hardware_flops_per_token(cost, run.train.activation_checkpointing) / peak,
        "model_flops_per_token": flops,
    }


def _finite(losses: list[float]) -> dict[str, Any]:
    return {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "correct": all(math.isfinite(loss) for loss in losses),
    }


REFERENCE_STEPS = 3


def verdict(config: BenchConfig, run: RunConfig, losses: list[float], device: torch.device) -> dict[str, Any]:
    """Compare the first losses with those of the plainest path: fp32, eager, reference kernels, one row at a time."""
    tolerance = config.tolerance or (0.01 if run.train.precision == "bf16" else 1e-4)
    timer = StepTimer()
    plain = run.train.replace(
        precision="fp32",
        compile=False,
        micro_batch_size=1,
        activation_checkpointing="full",
        loss_chunk=None,
        steps=REFERENCE_STEPS,
    )
    reference = run.replace(
        name=f"{run.name}-reference",
        train=plain,
        checkpoint=run.checkpoint.replace(every_steps=None, asynchronous=False),
    )
    with _reference_kernels():
        train(reference, timer)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, timer.losses))
    found = _finite(losses)
    return found | {
        "correct": found["correct"] and worst <= tolerance,
        "reference_losses": timer.losses,
        "max_relative_difference": worst,
        "tolerance": tolerance,
    }


@contextmanager
def _reference_kernels() -> Iterator[None]:
    from kernels.dispatch import ENVIRONMENT

    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def _measure_peer(config: BenchConfig, run: RunConfig, device: torch.device) -> dict[str, Any]:
    """transformers' Llama of the same shape: torch.compile, autocast, fused AdamW, clipping, as many tokens a step."""
    model: Any = build_peer(run.model).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.optim.lr, betas=run.optim.betas, weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if run.train.compile else model
    shape_of_batch = (run.train.micro_batch_size, run.data.seq_len)
    num_microbatches = run.train.batch_tokens // (shape_of_batch[0] * shape_of_batch[1])
    rng = torch.Generator().manual_seed(run.seed)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if run.train.precision == "bf16" else nullcontext()

    ends, losses = [time.perf_counter()], []
    for _ in range(config.warmup + config.steps):
        total = torch.zeros((), device=device)
        for _ in range(num_microbatches):
            tokens = torch.randint(run.model.required_vocab_size(), shape_of_batch, generator=rng).to(device)
            with autocast():
                loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss / num_microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
        ends.append(time.perf_counter())
    seconds = [after - before for before, after in zip(ends, ends[1:])]
    timed = seconds[config.warmup :]
    return (
        _figures(run, device, run.train.batch_tokens / statistics.fmean(timed))
        | {
            "step_ms_median": 1e3 * statistics.median(timed),
            "step_ms_max": 1e3 * max(timed),
            "first_step_seconds": seconds[0],
            "steps": len(timed),
            "peak_memory_gib": peak_memory(device) / 2**30,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        | _finite(losses)
    )


def build_peer(model: ModelConfig) -> Any:
    """transformers' Llama with the shape of `model`; UserError when it is not a Llama of equal layers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("peer=transformers needs transformers: pip install 'manyformer[hf]'") from error
    block = model.blocks()[0]
    if any(other != block for other in model.blocks()) or block.mixer is None or block.channel is None:
        raise UserError("peer=transformers compares models of equal layers only")
    mixer, channel = block.mixer.to_dict(), block.channel.to_dict()
    n_heads = mixer["n_heads"]
    config = LlamaConfig(
        vocab_size=model.required_vocab_size(), hidden_size=model.d_model, intermediate_size=channel["d_hidden"],
        num_hidden_layers=model.n_layers, num_attention_heads=n_heads,
        num_key_value_heads=mixer.get("n_kv_heads") or n_heads,
        head_dim=mixer.get("d_head") or model.d_model // n_heads,
        max_position_embeddings=model.max_seq_len, tie_word_embeddings=model.head.tied, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def to_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON with at most six digits per figure."""
    return encode(json.loads(encode(record), parse_float=lambda text: float(f"{float(text):.6g}")))
