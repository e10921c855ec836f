"""One process, one device. Also the base of strategies in which every rank holds the whole model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.blocks.base import after_step
from llm.parallel.mesh import Place
from llm.train.config import RunConfig
from llm.train.optim import OptimizerSet, build_optimizer
from llm.train.optim.muon import Shards
from llm.train.strategies import common
from llm.train.strategies.base import NamedState


class SingleStrategy:
    """The whole model on one device; the others derive from it and say what differs."""

    name = "single"

    def __init__(self, place: Place, *, owns_group: bool = False) -> None:
        self.place = place
        self.rank = place.rank
        self.world_size = place.world_size
        self.device = place.device
        self.owns_group = owns_group
        self.precision = "fp32"
        self.model: nn.Module
        self.bare: nn.Module
        self.optimizer: OptimizerSet

    def setup(self, model: nn.Module, run: RunConfig, seed: int) -> None:
        """Take a model on meta and make it ready to train."""
        self.precision = run.train.precision
        common.prepare_blocks(model, run, self.device)
        self.bare = model
        self.model = self._place(model, run, seed)
        self.optimizer = build_optimizer(self.bare, run.optim, precision=self.precision, shards=self._shards())

    def _place(self, model: nn.Module, run: RunConfig, seed: int) -> nn.Module:
        common.materialise(model, self.device, seed)
        return model

    def _shards(self) -> Shards | None:
        return None

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        return common.autocast(self.device, self.precision)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _grads(self) -> list[Tensor]:
        return [param.grad for param in self.optimizer.params.values() if param.grad is not None]

    def _reduce_square_sum(self, square_sum: Tensor) -> Tensor:
        return square_sum

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> Tensor:
        grads = self._grads()
        norm = self._reduce_square_sum(common.square_sum(grads, self.device)).sqrt()
        if max_norm is not None:
            common.scale_grads(grads, common.clip_coefficient(norm, max_norm))
        return norm

    def step(self, lr_factor: float, skip: bool) -> None:
        if not skip:
            self.optimizer.step(lr_factor)
            after_step(self.bare, self.all_reduce)
        self.optimizer.zero_grad()

    def all_reduce(self, values: Tensor) -> Tensor:
        return common.reduce_sum(values)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def state(self) -> NamedState:
        return NamedState(common.named_tensors(self.bare), self.optimizer.state())

    def load(self, state: NamedState) -> None:
        common.copy_named(self.state(), state)

    def unsharded(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model)

    def close(self) -> None:
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
