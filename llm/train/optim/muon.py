"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, matrix by matrix, by a Newton-Schulz iteration.

torch.optim.Muon is the same rule for whole 2-D tensors. This one also takes stacks of matrices, works on shards by
putting the whole matrix together first, batches equal shapes, and lets each rank orthogonalise its share of them. A
test holds both equal.

Legend: n matrices of one shape, r rows, c columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic polynomial of Jordan et al., chosen for the largest slope at zero."""

EPS = 1e-7


def newton_schulz_dtype(device_type: str, precision: str) -> torch.dtype:
    """What the iteration computes in: bf16 in a bf16 run where that is fast (on GPUs, and on CPUs with instructions for
    it, where it is four times as fast), else fp32. In bf16 rounding alone moves losses by about 1e-3 relative."""
    fast = device_type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if precision == "bf16" and fast else torch.float32


def orthogonalise(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Near-orthogonal factor of each matrix of x [n, r, c] (singular values go to about 0.7 .. 1.2), in `dtype`."""
    a, b, c = COEFFICIENTS
    transposed = x.shape[-2] > x.shape[-1]
    x = x.to(dtype)
    x = x.mT if transposed else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x


def lr_scale(rows: int, cols: int) -> float:
    """Factor on the learning rate that gives an update of the root mean square of AdamW's, about 0.2 (Liu et al. 2025),
    hence one learning rate serves both."""
    return 0.2 * math.sqrt(max(rows, cols))


def orthogonalise_equal(
    updates: list[Tensor], steps: int, dtype: torch.dtype, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """`orthogonalise` of whole tensors of one shape, [r, c] or [n, r, c] each; the ranks of `group`, which all hold the
    same ones, each take a share of the matrices."""
    shape = updates[0].shape
    matrices = torch.stack(updates).reshape(-1, *shape[-2:])
    size = 1 if group is None else dist.get_world_size(group)
    count = len(matrices)
    if size == 1 or count == 1:
        return list(orthogonalise(matrices, steps, dtype).reshape(-1, *shape))
    share = -(-count // size)
    rank = dist.get_rank(group)
    mine = matrices[rank * share : (rank + 1) * share]
    padded = mine.new_zeros(share, *shape[-2:], dtype=dtype)
    if len(mine):
        padded[: len(mine)] = orthogonalise(mine, steps, dtype)
    gathered = padded.new_empty(size * share, *shape[-2:])
    dist.all_gather(list(gathered.split(share)), padded, group=group)
    return list(gathered[:count].reshape(-1, *shape))


class Shards(Protocol):
    """How parameters are stored, as far as Muon must know."""

    def local(self, param: Tensor) -> Tensor:
        """The part of a parameter, gradient or momentum that this rank stores."""

    def whole(self, updates: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        """Whole tensors of local parts; a collective call when they are spread."""

    def part(self, whole: Tensor, param: Tensor) -> Tensor:
        """This rank's part of a whole tensor, shaped as `local(param)`."""

    def group(self) -> dist.ProcessGroup | None:
        """Ranks that all hold the same whole tensors after `whole` and may share the work; None: this one alone."""


class WholeTensors:
    """Parameters that every rank stores in full. group: ranks over which the work is shared."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def local(self, param: Tensor) -> Tensor:
        return param

    def whole(self, updates: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        return updates

    def part(self, whole: Tensor, param: Tensor) -> Tensor:
        return whole

    def group(self) -> dist.ProcessGroup | None:
        return self._group


class DTensorShards:
    """FSDP2's parameters: DTensors, sharded and perhaps replicated. group: the ranks that share one replica."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def local(self, param: Tensor) -> Tensor:
        return param.to_local()  # type: ignore[attr-defined]

    def whole(self, updates: list[Tensor], params: list[Any]) -> list[Tensor]:
        from torch.distributed.tensor import DTensor

        return [
            DTensor.from_local(
                update, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            ).full_tensor()
            for update, p in zip(updates, params, strict=True)
        ]

    def part(self, whole: Tensor, param: Any) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None).to_local()

    def group(self) -> dist.ProcessGroup | None:
        return self._group


class Muon(torch.optim.Optimizer):
    """Muon over matrices [r, c] or stacks [n, r, c]; state: "momentum_buffer".

    lr and weight_decay as in AdamW (decoupled); momentum is an exponential mean, nesterov looks one step ahead;
    ns_steps and ns_dtype of the iteration; shards: how the parameters are stored (default: whole).
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        ns_dtype: torch.dtype = torch.float32,
        shards: Shards | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)
        self.ns_dtype = ns_dtype
        self.shards: Shards = shards if shards is not None else WholeTensors()
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(tuple(param.shape), []).append(param)
            for params in by_shape.values():
                self._step_equal(params, group)

    def _step_equal(self, params: list[Tensor], group: dict[str, Any]) -> None:
        local = self.shards.local
        weights = [local(param) for param in params]
        grads = [local(param.grad) for param in params]  # type: ignore[arg-type]
        buffers = [local(self.state[param]["momentum_buffer"]) for param in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = list(torch._foreach_lerp(grads, buffers, group["momentum"])) if group["nesterov"] else buffers
        wholes = self.shards.whole(updates, params)
        directions = orthogonalise_equal(wholes, group["ns_steps"], self.ns_dtype, self.shards.group())
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * lr_scale(*wholes[0].shape[-2:])
        for weight, direction, param in zip(weights, directions, params, strict=True):
            weight.sub_(self.shards.part(direction, param).to(weight.dtype), alpha=rate)
