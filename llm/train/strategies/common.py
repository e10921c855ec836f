"""What the strategies have in common: materialising a model, gradient norms, named state."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.core.errors import UserError, nearest
from llm.core.init import clean_name, copy_full, initialise
from llm.parallel.activation_checkpointing import checkpoint_blocks
from llm.parallel.compile import compile_blocks
from llm.parallel.plan import model_plan
from llm.train.config import RunConfig
from llm.train.strategies.base import NamedState


def prepare_blocks(model: nn.Module, run: RunConfig, device: torch.device) -> None:
    """Activation checkpointing and compilation of each block, before anything is sharded."""
    checkpoint_blocks(model, run.train.activation_checkpointing, model_plan(model).ac_keep)
    if run.train.compile:
        compile_blocks(model, device)


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a model on meta its storage, tie it again, fill it by name, and check that the tying held."""
    tied = is_tied(model)
    model.to_empty(device=device)
    if tied:
        model.tie()  # type: ignore[operator]
    initialise(model, seed)
    assert is_tied(model) == tied, "the head and the embedding came apart"


def is_tied(model: nn.Module) -> bool:
    """Whether head and embedding share one parameter; False for models that do not know the question."""
    return bool(model.is_tied()) if hasattr(model, "is_tied") else False  # type: ignore[operator]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing in fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def square_sum(grads: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of this rank's parts, fp32 scalar on `device`."""
    parts = [local(grad) for grad in grads]
    if not parts:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm([part.float() for part in parts if part.numel()])
    return torch.stack([norm.to(device) for norm in norms]).square().sum() if norms else torch.zeros((), device=device)


def scale_grads(grads: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a device scalar."""
    parts = [local(grad) for grad in grads]
    if parts:
        torch._foreach_mul_(parts, factor.to(parts[0].device))


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Factor that brings a norm down to `max_norm`, at most 1."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Clean dotted name -> live parameter or persistent buffer; a tied one once, under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[clean_name(name)] = tensor.detach()
    return found


@torch.no_grad()
def copy_named(live: NamedState, given: NamedState) -> None:
    """Copy `given` into `live`, tensor by tensor. UserError names the first tensor that is missing or does not fit."""
    _copy_all("parameter", live.model, given.model)
    if given.optim:
        flat_live = {f"{name}/{key}": t for name, state in live.optim.items() for key, t in state.items()}
        flat_given = {f"{name}/{key}": t for name, state in given.optim.items() for key, t in state.items()}
        _copy_all("optimizer state", flat_live, flat_given)


def _copy_all(kind: str, live: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    for name, target in live.items():
        if name not in given:
            close = nearest(name, given)
            hint = f"; it has {close[0]!r}" if close else ""
            raise UserError(f"the checkpoint has no {kind} {name!r}{hint}: it is of another model or optimizer")
        if tuple(given[name].shape) != tuple(target.shape):
            raise UserError(
                f"the checkpoint's {kind} {name!r} has shape {list(given[name].shape)}, this run's has "
                f"{list(target.shape)}"
            )
    for name, target in live.items():
        source = given[name]
        if source is target:
            continue
        if hasattr(target, "to_local") and not hasattr(source, "to_local"):
            copy_full(target, source)
        else:
            target.copy_(
                source.full_tensor() if hasattr(source, "full_tensor") and not hasattr(target, "to_local") else source
            )
    extra = sorted(set(given) - set(live))
    if extra:
        raise UserError(
            f"the checkpoint has a {kind} {extra[0]!r} that this run does not know: it is of another model or optimizer"
        )


def reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place; nothing to do for a lone process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
