"""Where the parameters of a DeepSpeed ZeRO optimizer lie in its flat buffers, and an optimizer over such buffers.

Each parameter group (stages 1 and 2) or sub-group (stage 3) is one flat fp32 partition per rank, on which DeepSpeed
calls our optimizer. A layout puts the whole tensors of such a buffer together from all ranks, and takes this rank's
part back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from llm.train.config import OptimConfig
from llm.train.optim.build import STATE_NAMES
from llm.train.optim.muon import lr_scale, orthogonalise_equal


@dataclass(frozen=True)
class FlatLayout:
    """names and shapes of the parameters in one flat buffer, in order.

    interleaved: False, the ranks' partitions one after the other hold the parameters one after the other (stages 1, 2);
    True, each partition holds a slice of every parameter (stage 3), and `slices` are their lengths.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    interleaved: bool
    slices: tuple[int, ...] = ()

    def whole(self, partition: Tensor) -> dict[str, Tensor]:
        """Name -> whole tensor, from each rank's partition [n]; a collective call."""
        world_size = dist.get_world_size()
        gathered = partition.new_empty(world_size, partition.numel())
        dist.all_gather(list(gathered.unbind(0)), partition.detach().contiguous())
        if not self.interleaved:
            pieces = gathered.flatten().split([*self._numels(), gathered.numel() - sum(self._numels())])[:-1]
        else:
            columns = gathered.split(list(self.slices), dim=1)
            pieces = [column.flatten()[:numel] for column, numel in zip(columns, self._numels(), strict=True)]
        return {n: piece.view(shape) for n, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def part(self, tensors: dict[str, Tensor], like: Tensor) -> Tensor:
        """This rank's partition, as `like` [n], of whole tensors by name."""
        world_size, rank = dist.get_world_size(), dist.get_rank()
        flats = [tensors[name].flatten().to(device=like.device, dtype=like.dtype) for name in self.names]
        if not self.interleaved:
            whole = torch.cat(flats)
            padded = whole.new_zeros(world_size * like.numel())
            padded[: whole.numel()] = whole
            return padded[rank * like.numel() : (rank + 1) * like.numel()]
        parts = []
        for flat, length in zip(flats, self.slices, strict=True):
            padded = flat.new_zeros(world_size * length)
            padded[: flat.numel()] = flat
            parts.append(padded[rank * length : (rank + 1) * length])
        return torch.cat(parts)

    def _numels(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]


class FlatOptimizer(torch.optim.Optimizer):
    """AdamW and Muon on flat partitions. A group's `kind` says which; `skip` makes the next steps do nothing.

    DeepSpeed replaces the parameters by flat partitions after construction and calls `step` once for each; `attach`
    then says how they are laid out and makes the state.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], optim: OptimConfig, ns_dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": optim.lr, "weight_decay": optim.weight_decay, "kind": "adamw"})
        self.optim = optim
        self.ns_dtype = ns_dtype
        self.skip = False
        self.layouts: dict[Tensor, FlatLayout] = {}

    def attach(self, flat: Tensor, layout: FlatLayout, kind: str) -> None:
        """Tell how a partition is laid out; makes its optimizer state, zeros."""
        self.layouts[flat] = layout
        for name in STATE_NAMES[kind]:
            self.state[flat][name] = torch.zeros((), device=flat.device) if name == "step" else torch.zeros_like(flat)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.skip:
            return
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    (self._muon if group["kind"] == "muon" else self._adamw)(flat, group)

    def _adamw(self, flat: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[flat], self.optim.betas
        adamw(
            [flat], [flat.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],  # type: ignore[list-item]
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=self.optim.eps, maximize=False,
        )  # fmt: skip

    def _muon(self, flat: Tensor, group: dict[str, Any]) -> None:
        assert flat.grad is not None
        buffer, momentum = self.state[flat]["momentum_buffer"], self.optim.momentum
        buffer.lerp_(flat.grad, 1 - momentum)
        update = flat.grad.lerp(buffer, momentum) if self.optim.nesterov else buffer
        layout = self.layouts[flat]
        wholes = layout.whole(update)
        by_shape: dict[torch.Size, list[str]] = {}
        for name, whole in wholes.items():
            by_shape.setdefault(whole.shape, []).append(name)
        directions: dict[str, Tensor] = {}
        for shape, names in by_shape.items():
            found = orthogonalise_equal(
                [wholes[name] for name in names], self.optim.ns_steps, self.ns_dtype, dist.group.WORLD
            )
            directions.update({n: d.float() * lr_scale(*shape[-2:]) for n, d in zip(names, found, strict=True)})
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        flat.sub_(layout.part(directions, flat), alpha=group["lr"])
