"""FSDP2: parameters, gradients and optimizer state sharded over ranks (ZeRO-3), or over groups of ranks (HSDP)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from llm.parallel.mesh import Place, data_mesh
from llm.parallel.plan import fp32_modules
from llm.train.config import ParallelConfig, RunConfig
from llm.train.optim.muon import DTensorShards, Shards
from llm.train.strategies import common
from llm.train.strategies.single import SingleStrategy


class FSDP2Strategy(SingleStrategy):
    """One unit per block, and the root for the rest, so that a tied embedding and head share a unit.

    The forward pass, also in evaluation, is a collective call: all ranks must make the same ones.
    """

    name = "fsdp2"

    def __init__(self, place: Place, parallel: ParallelConfig, *, owns_group: bool = False) -> None:
        super().__init__(place, owns_group=owns_group)
        self.parallel = parallel
        self.mesh = data_mesh(place, parallel.replicate)
        self.shard_group = self.mesh.get_group("shard")

    def _place(self, model: nn.Module, run: RunConfig, seed: int) -> nn.Module:
        bf16 = torch.bfloat16 if run.train.precision == "bf16" else None
        offload = OffloadPolicy()
        if self.parallel.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

        def shard(module: nn.Module, dtype: torch.dtype | None, reshard: bool) -> None:
            # Inputs are not cast: that would also lower the position tables which travel with the sequence description.
            precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(
                module, mesh=self.mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=reshard
            )
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

        for module in fp32_modules(model) if bf16 is not None else []:
            shard(module, None, self.parallel.reshard_after_forward)
        for _, block in model.blocks():  # type: ignore[operator]
            shard(block, bf16, self.parallel.reshard_after_forward)
        # The root stays whole between its forward and backward pass: the loss calls `head` in between.
        shard(model, bf16, False)
        common.materialise(model, torch.device("cpu") if self.parallel.cpu_offload else self.device, seed)
        return model

    def _shards(self) -> Shards:
        return DTensorShards(self.shard_group)

    def _root(self) -> FSDPModule:
        assert isinstance(self.bare, FSDPModule)
        return self.bare

    @contextmanager
    def _accumulate(self, last: bool) -> Iterator[None]:
        self._root().set_requires_gradient_sync(last)
        self._root().set_is_last_backward(last)
        yield

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return self._accumulate(last)

    def _reduce_square_sum(self, square_sum: Tensor) -> Tensor:
        dist.all_reduce(square_sum, group=self.shard_group)
        return square_sum
