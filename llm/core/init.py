"""Initialisation by name: a parameter's values are a pure function of (seed, dotted name), whatever the layout.

A module says how its own parameters and buffers start in `init_spec()`; `initialise` fills them, also when they are
shards of a larger tensor, so every strategy and world size starts from the same weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""(shape, generator) -> fp32 CPU tensor of that shape."""


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="cpu", dtype=torch.float32)


def normal(std: float, mean: float = 0.0) -> Init:
    """Normal distribution."""
    return lambda shape, rng: _empty(shape).normal_(mean, std, generator=rng)


def truncated_normal(std: float, bound: float = 3.0) -> Init:
    """Normal distribution cut at `bound` standard deviations: values beyond are drawn again.

    torch's own trunc_normal_ draws other values in 2.11 than in 2.13, which draws as here.
    """

    def draw(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        values = _empty(shape).normal_(0.0, std, generator=rng)
        while bool((beyond := values.abs() > bound * std).any()):
            values = torch.where(beyond, _empty(shape).normal_(0.0, std, generator=rng), values)
        return values

    return draw


def uniform(low: float, high: float) -> Init:
    """Uniform distribution on [low, high)."""
    return lambda shape, rng: _empty(shape).uniform_(low, high, generator=rng)


def constant(value: float) -> Init:
    """Every entry the same."""
    return lambda shape, rng: torch.full(shape, value, device="cpu", dtype=torch.float32)


def computed(make: Callable[[], Tensor]) -> Init:
    """A fixed tensor, for buffers such as tables and state matrices."""
    return lambda shape, rng: make()


def name_seed(seed: int, name: str) -> int:
    """63-bit seed of a parameter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def clean_name(name: str) -> str:
    """Dotted name without the segments that wrappers (DDP, compile, checkpointing, our own model wrappers) put in."""
    skip = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_wrapped_model", "_wrapped_block"}
    parts = [part for part in name.split(".") if part not in skip]
    return ".".join(parts[1:] if parts and parts[0] == "module" else parts)


def init_specs(model: nn.Module) -> Iterator[tuple[str, Tensor, Init]]:
    """(clean dotted name, tensor, how it starts) of every parameter and buffer; one without a spec is our bug."""
    for prefix, module in model.named_modules(remove_duplicate=True):
        own: dict[str, Any] = dict(module._parameters)
        own.update(module._buffers)
        spec: dict[str, Init] = module.init_spec() if hasattr(module, "init_spec") else {}  # type: ignore[operator]
        for name, tensor in own.items():
            if tensor is None:
                continue
            dotted = clean_name(f"{prefix}.{name}" if prefix else name)
            assert name in spec, f"{type(module).__name__}.init_spec does not cover {dotted}"
            yield dotted, tensor, spec[name]


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a materialised model, then check that each is finite.

    Tied parameters are filled once, under the first name that reaches them.
    """
    done: set[int] = set()
    for name, tensor, init in init_specs(model):
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        rng = torch.Generator().manual_seed(name_seed(seed, name))
        with torch.device("cpu"):
            full = init(tuple(tensor.shape), rng)
        copy_full(tensor, full)
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        assert not local.is_floating_point() or bool(torch.isfinite(local).all()), f"{name} is not finite after init"


@torch.no_grad()
def copy_full(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor into `target`, which may be a DTensor: each rank takes its own part, no communication."""
    assert tuple(target.shape) == tuple(full.shape), f"shape {tuple(full.shape)} for a target of {tuple(target.shape)}"
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        local = target.to_local()
        full = full.to(device=local.device, dtype=local.dtype)
        part = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        local.copy_(part.to_local())
    else:
        target.copy_(full)


def depth_scaled(std: float, n_layers: int, per_layer: int = 2) -> float:
    """Standard deviation of a projection into the residual stream, GPT-2's rule: std / sqrt(per_layer * n_layers)."""
    return std / math.sqrt(per_layer * n_layers)
