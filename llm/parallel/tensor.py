"""Tensor parallelism for inference: every rank holds a share of the heads and of the hidden units of each layer.

A rank's model is an ordinary, smaller one, so that its decode state is smaller too. What a rowwise layer gives is added
up over the ranks; embeddings, norms, head and wrappers stand on all of them (Shoeybi et al. 2019, arXiv:1909.08053).
The parts say how they are split (`ParallelPlan`).
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.blocks.base import ChannelConfig, MixerConfig
from llm.core.errors import UserError
from llm.core.init import clean_name
from llm.models.config import LayerGroup, ModelConfig
from llm.parallel.plan import ParallelPlan, TPStyle, plan_of

BY_HEAD = ("alibi",)
"""Positions that differ from head to head by its number."""
ALONE = "run it in one process"


class Ranks(NamedTuple):
    """This process among those that share a model. group: of torch.distributed (None: all)."""

    rank: int
    size: int
    group: Any = None


def join_ranks(device: torch.device) -> Ranks | None:
    """The processes that torchrun started, joined (nccl on CUDA, where each takes the device of its local rank, else
    gloo) until this one ends; None for a single one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # gloo's threads, when they outlive the interpreter, abort the process now and then.
        atexit.register(_leave)
    return Ranks(dist.get_rank(), size)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def same_for_all(ranks: Ranks, value: Any, device: torch.device) -> Any:
    """What rank 0 gives as `value`, plain data, on every rank."""
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, 0, group=ranks.group)
    data = data if ranks.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0, group=ranks.group)
    return json.loads(bytes(data.tolist()))


def share_config(config: ModelConfig, n_ranks: int) -> ModelConfig:
    """The config of one rank's model. UserError, which names the layer, where a part cannot be split so."""
    blocks = []
    for index, block in enumerate(config.blocks()):
        ctx = config.context(index, block)
        position = (block.position or config.position).type
        changes: dict[str, Any] = {}
        for role, part in (("mixer", block.mixer), ("channel", block.channel)):
            if part is None:
                continue
            plan = _plan(part, f"layers.{index}.{role}")
            if plan.divides and position in BY_HEAD and role == "mixer":
                raise UserError(f"layers.{index} has positions {position}, which go by a head's number; {ALONE}")
            changes[role] = _share_of_part(part, plan, config.d_model, n_ranks, f"layers.{index}.{role}")
            for name in plan.tp or {}:
                linear = ctx.linear_config(f"{role}.{name}")
                _plan(linear, f"layers.{index}.{role}.{name}")
        blocks.append(block.replace(**changes))
    for wrapper in config.wrappers:
        _plan(wrapper, f"wrapper {wrapper.type}")
    return config.replace(layers=[LayerGroup(pattern=blocks)])


def _plan(part: Any, where: str) -> ParallelPlan:
    plan = plan_of(part)
    if plan.tp is None:
        reason = (plan.tp_refused or "No plan says how.").rstrip(".")
        raise UserError(f"{where} ({part.type}) is not split over processes; {ALONE}. {reason}.")
    return plan


def _share_of_part(
    part: MixerConfig | ChannelConfig, plan: ParallelPlan, d_model: int, n_ranks: int, where: str
) -> MixerConfig | ChannelConfig:
    """The config with its heads or hidden units divided. What follows from the model's width is written out first."""
    values: dict[str, Any] = {}
    for name in plan.divides:
        value = getattr(part, name)
        if value is None and name == "d_hidden":
            value = part.width(d_model)  # type: ignore[union-attr]
        if value is None:
            continue
        if value % n_ranks:
            raise UserError(f"{where}: {name} {value} cannot be divided among {n_ranks} processes; start fewer")
        values[name] = value // n_ranks
    if "n_heads" in values and part.d_head is None:  # type: ignore[union-attr]
        values["d_head"] = d_model // part.n_heads  # type: ignore[union-attr]
    return part.replace(**values)


class Shares(Mapping[str, Tensor]):
    """One rank's part of each full tensor, cut when it is asked for."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        self.styles, self.tensors, self.ranks = _styles(config), tensors, ranks

    def __getitem__(self, name: str) -> Tensor:
        full = self.tensors[name]
        parent, _, leaf = name.rpartition(".")
        style = self.styles.find(parent)
        if style == "rowwise" and leaf == "bias":
            # It is added once.
            return full if self.ranks.rank == 0 else torch.zeros_like(full)
        if style not in ("colwise", "rowwise"):
            return full
        dim = 0 if style == "colwise" else 1
        size = full.shape[dim] // self.ranks.size
        return full.narrow(dim, self.ranks.rank * size, size).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _Styles(NamedTuple):
    """Globs of the names of linears."""

    globs: list[tuple[str, TPStyle]]

    def find(self, name: str) -> TPStyle | None:
        return next((style for glob, style in self.globs if fnmatchcase(name, glob)), None)


def _styles(config: ModelConfig) -> _Styles:
    globs: list[tuple[str, TPStyle]] = []
    for index, block in enumerate(config.blocks()):
        for role, part in (("mixer", block.mixer), ("channel", block.channel)):
            tp = None if part is None else plan_of(part).tp
            globs += [(f"layers.{index}.{role}.{name}", style) for name, style in (tp or {}).items()]
    return _Styles(globs)


def sum_over_ranks(model: nn.Module, config: ModelConfig, ranks: Ranks) -> None:
    """Make one rank's model, built of `Shares`, give the hidden states of the whole model (but for the order of a sum).
    config: of the whole. All ranks must then read the same tokens."""
    styles = _styles(config)
    for name, module in model.named_modules():
        if styles.find(clean_name(name)) == "rowwise":
            module.register_forward_hook(_summed(ranks))


def _summed(ranks: Ranks) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.contiguous()
        dist.all_reduce(output, group=ranks.group)
        return output

    return hook
