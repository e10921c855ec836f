"""Agreement between the ranks that save together, over gloo groups of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """One process among all. Two gloo groups keep the training thread and the saving thread apart from each other
    and from the collectives of training; making them is itself a collective. Without torch.distributed: one rank."""

    def __init__(self) -> None:
        live = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if live else 0
        self.world_size = dist.get_world_size() if live else 1
        self._front = dist.new_group(backend="gloo") if live else None
        self._back = dist.new_group(backend="gloo") if live else None

    def gather(self, value: Any, *, background: bool = False) -> list[Any]:
        """Every rank's value, by rank, on every rank. background: called from the saving thread."""
        if self._front is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._back if background else self._front)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value."""
        if self._front is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._front)
        return box[0]

    def scatter(self, values: list[Any] | None) -> Any:
        """This rank's entry of the list that rank 0 gives."""
        if self._front is None:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, values, src=0, group=self._front)
        return box[0]

    def all_true(self, flag: bool) -> bool:
        """True when every rank says so."""
        if self._front is None:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self._front)
        return bool(value)
