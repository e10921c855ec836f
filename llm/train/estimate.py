"""What a run would cost, from its config alone: parameters, FLOPs, decode state, and the memory of one rank by part.

Memory is not computed from formulas of blocks. One whole step of the real model, loss and optimizer is run on fake
tensors, which have shapes but no data, and every storage is followed from its making to its end.
"""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from llm.core.batch import Microbatch
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.parallel.activation_checkpointing import checkpoint_blocks
from llm.parallel.plan import model_plan
from llm.train.callbacks.throughput import hardware_flops_per_token, training_flops_per_token
from llm.train.config import RunConfig
from llm.train.live_memory import LiveMemory, nbytes, replace_tensors
from llm.train.loss import LanguageModelLoss
from llm.train.optim import build_optimizer
from llm.train.strategies import common

CheckpointingMode = Literal["none", "selective", "full"]
MODES: tuple[CheckpointingMode, ...] = ("none", "selective", "full")
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "gathered")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank at the moment when it holds most.

    parts: weights, gradients, optimizer; activations (with weights cast by autocast, and temporaries of the backward
    pass); logits (head and loss); gathered (parameters and gradients put together again by a sharded strategy).
    host: bytes kept in the host's memory by CPU offload.
    """

    activation_checkpointing: CheckpointingMode
    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Layout:
    """How many ranks share a thing: weights, gradients and optimizer state are divided by these; `compute_dtype` is
    what sharded strategies gather in."""

    strategy: str
    world_size: int
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1

    @property
    def sharded(self) -> bool:
        """Whether parameters are gathered block by block."""
        return self.weights > 1 or self.strategy == "fsdp2"


def layout(run: RunConfig, world_size: int) -> Layout:
    """The layout of a run's strategy; UserError when the world size does not suit it."""
    name, parallel = run.parallel.strategy, run.parallel
    if name == "single" and world_size > 1:
        raise UserError(
            f"parallel.strategy=single is for one process, given world_size={world_size}; "
            "set parallel.strategy=ddp or fsdp2"
        )
    if name == "fsdp2":
        if world_size % parallel.replicate:
            raise UserError(
                f"parallel.replicate {parallel.replicate} does not divide world_size {world_size}; change one of them"
            )
        shard = world_size // parallel.replicate
        return Layout(name, world_size, shard, shard, shard)
    if name == "deepspeed":
        stage = parallel.zero_stage
        return Layout(name, world_size, *(world_size if stage >= needed else 1 for needed in (3, 2, 1)))
    return Layout(name, world_size)


def estimate_memory(run: RunConfig, mode: CheckpointingMode, world_size: int = 1) -> MemoryEstimate:
    """Memory of one rank in a steady step (the second one) under activation checkpointing `mode`.

    UserError when the model cannot run without data, such as one whose shapes depend on values.
    """
    place = layout(run, world_size)
    measure = _sharded if place.strategy in ("fsdp2", "deepspeed") else _whole
    try:
        try:
            with _attention_of(run.train.device):
                return measure(run, mode, place)
        except UserError:
            # Fused attention may lack what this model needs, such as a soft-cap; then as on a CPU.
            return measure(run, mode, place)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"the memory of this model cannot be estimated: its shapes depend on values ({error.func}); "
            "its parameters and FLOPs are in model.cost"
        ) from error


def _whole(run: RunConfig, mode: CheckpointingMode, place: Layout) -> MemoryEstimate:
    with _Step(run, mode, place) as step:
        optimizer = build_optimizer(step.model, run.optim)
        step.memory.move((t for state in optimizer.state().values() for t in state.values()), "optimizer")

        def update() -> None:
            grads = [p.grad for p in optimizer.params.values() if p.grad is not None]
            norm = common.square_sum(grads, torch.device("cpu")).sqrt()
            if run.optim.clip_norm is not None:
                common.scale_grads(grads, common.clip_coefficient(norm, run.optim.clip_norm))
            optimizer.step(1.0)
            optimizer.zero_grad()

        step.run(update)
        step.memory.reset_peak()
        step.run(update)
        return MemoryEstimate(mode, {part: step.memory.at_peak.get(part, 0) for part in PARTS})


def _sharded(run: RunConfig, mode: CheckpointingMode, place: Layout) -> MemoryEstimate:
    """Activations are measured with parameters already in the compute dtype; what is sharded is counted."""
    with _Step(run, mode, place) as step:
        params = list(step.model.parameters())
        block_sizes = [sum(p.numel() for p in block.parameters()) for _, block in step.model.blocks()]  # type: ignore[operator]
        count = sum(p.numel() for p in params)
        optimizer = build_optimizer(step.model, run.optim)
        state = nbytes(t for slots in optimizer.state().values() for t in slots.values())
        del optimizer
        gc.collect()
        width = 2 if run.train.precision == "bf16" else 4
        if width == 2:
            replace_tensors(step.model, Tensor.bfloat16, buffers=False)
        del params
        step.memory.move(step.model.parameters(), "weights")
        step.watch_parameters()
        step.memory.reset_peak("weights", "gradients", "optimizer")
        step.run(lambda: None)
        live = step.memory.at_peak
    root, block = count - sum(block_sizes), max(block_sizes, default=0)
    parts = {part: live.get(part, 0) for part in ("activations", "logits")}
    whole_gradients = 4 * count if step.num_microbatches > 1 and place.strategy == "fsdp2" else 0
    if place.strategy == "fsdp2":
        weights, gradients, optim = 4 * count / place.weights, 4 * count / place.gradients, state / place.optimizer
        blocks = 2 * block if run.parallel.reshard_after_forward else sum(block_sizes)
        # Gathered: the root, the block at work and the next one, and one more in the buffer they arrive in. In the
        # backward pass, a block's gradients as they are made and in fp32 for the reduction; all of them, unreduced,
        # while microbatches accumulate.
        gathered = width * (root + blocks + block) + (width + 4) * block + whole_gradients
    else:
        # bf16 weights and gradients beside an fp32 master copy that belongs to the optimizer; buckets of 500M elements.
        weights, gradients = width * count / place.weights, width * count / place.gradients
        optim = (state + (4 * count if width == 2 else 0)) / place.optimizer
        bucket = width * min(count, 500_000_000)
        gathered = width * (root + 2 * block) + bucket if place.weights > 1 else (bucket if place.gradients > 1 else 0)
    sharded = {"weights": weights, "gradients": gradients, "optimizer": optim}
    host = 0
    if run.parallel.cpu_offload:
        host, sharded = math.ceil(sum(sharded.values())), dict.fromkeys(sharded, 0)
    parts |= {name: math.ceil(size) for name, size in sharded.items()} | {"gathered": math.ceil(gathered)}
    return MemoryEstimate(mode, {part: parts.get(part, 0) for part in PARTS}, host)


class _Step:
    """A model on fake tensors with its memory followed; `run` is one optimizer step."""

    def __init__(self, run: RunConfig, mode: CheckpointingMode, place: Layout) -> None:
        self.config = run
        self.mode: CheckpointingMode = mode
        sequences = max(1, run.train.batch_tokens // run.data.seq_len // place.world_size)
        self.batch = min(run.train.micro_batch_size, sequences)
        self.num_microbatches = math.ceil(sequences / self.batch)
        self.loss = LanguageModelLoss(run.train.z_loss, run.train.loss_chunk)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.memory = LiveMemory()

    def __enter__(self) -> _Step:
        self.model: nn.Module = self.config.model.build("meta")
        self.fake.__enter__()
        self.memory.__enter__()
        replace_tensors(self.model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        self.memory.move(self.model.state_dict(keep_vars=True).values(), "weights")
        checkpoint_blocks(self.model, self.mode, model_plan(self.model).ac_keep)
        self.model.register_forward_hook(self._model_done)
        self.watch_parameters()
        return self

    def __exit__(self, *error: Any) -> None:
        self.memory.__exit__(*error)
        self.fake.__exit__(*error)
        self.memory.close()

    def watch_parameters(self) -> None:
        """Book each parameter's gradient where it belongs, as soon as there is one."""
        for param in self.model.parameters():
            param.register_post_accumulate_grad_hook(self._grad_ready)

    def _grad_ready(self, param: Tensor) -> None:
        if param.grad is not None:
            self.memory.move([param.grad], "gradients")

    def _model_done(self, module: nn.Module, args: Any, output: Any) -> None:
        self.memory.part = "logits"
        if output.hidden.requires_grad:
            output.hidden.register_hook(self._hidden_done)

    def _hidden_done(self, grad: Tensor) -> None:
        self.memory.part = "activations"

    def run(self, update: Any) -> None:
        """Forward and backward of up to two microbatches (more are like the second), then `update`."""
        autocast = (
            torch.autocast("cpu", dtype=torch.bfloat16) if self.config.train.precision == "bf16" else nullcontext()
        )
        for _ in range(min(2, self.num_microbatches)):
            self.memory.part = "activations"
            batch = self._microbatch()
            with autocast:
                out = self.loss(self.model, batch)
            (out.sum / 2).backward()
            del out, batch
        self.memory.part = "optimizer"
        with torch.no_grad():
            update()

    def _microbatch(self) -> Microbatch:
        # Documents that share a row would need values: each row stands for one document, which costs most.
        shape = (self.batch, self.config.data.seq_len)
        tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        return Microbatch(tokens, labels, SeqInfo.contiguous(*shape))


@contextmanager
def _attention_of(device: str) -> Iterator[None]:
    """Attention as a GPU would hold it (fused: output and log-sum-exp), unless the run is to be on a CPU.

    A choice made by the user in the environment stands.
    """
    from kernels.dispatch import ENVIRONMENT

    if device == "cpu" or ENVIRONMENT in os.environ:
        yield
        return
    os.environ[ENVIRONMENT] = "attention=sdpa"
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def estimate(run: RunConfig, world_size: int = 1, modes: tuple[CheckpointingMode, ...] = MODES) -> dict[str, Any]:
    """Everything `launch/estimate.py` prints, as plain data. The model's vocabulary size must be known."""
    model, seq_len = run.model, run.data.seq_len
    cost = model.cost(seq_len)
    decode = model.cost(seq_len, "decode")
    with _quiet():
        memory = {mode: estimate_memory(run, mode, world_size) for mode in modes}
    steps = run.train.total_steps
    train_flops = training_flops_per_token(cost)
    return {
        "name": run.name,
        "strategy": run.parallel.strategy,
        "world_size": world_size,
        "precision": run.train.precision,
        "seq_len": seq_len,
        "micro_batch_size": run.train.micro_batch_size,
        "parameters": cost.total.params,
        "active_parameters": cost.total.active_params,
        "embedding_parameters": cost.embed.params,
        "forward_flops_per_token": cost.total.flops_per_token,
        "attention_flops_per_token": cost.total.attention_flops,
        "decode_flops_per_token": decode.total.flops_per_token,
        "training_flops_per_token": train_flops,
        "hardware_flops_per_token": {mode: hardware_flops_per_token(cost, mode) for mode in modes},
        "steps": steps,
        "tokens": steps * run.train.batch_tokens,
        "training_flops": train_flops * steps * run.train.batch_tokens,
        "decode_state_bytes_per_sequence": decode.total.state_bytes_per_seq,
        "activation_checkpointing": run.train.activation_checkpointing,
        "memory_per_rank": {
            mode: {**found.parts, "total": found.total, **({"host": found.host} if found.host else {})}
            for mode, found in memory.items()
        },
    }
