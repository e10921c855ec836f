"""DistributedDataParallel: every rank holds the whole model, gradients are summed over ranks."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm.train.config import RunConfig
from llm.train.optim.muon import Shards, WholeTensors
from llm.train.strategies.single import SingleStrategy


class DDPStrategy(SingleStrategy):
    """Gradients are reduced in buckets during the last microbatch's backward pass."""

    name = "ddp"

    def _place(self, model: nn.Module, run: RunConfig, seed: int) -> nn.Module:
        super()._place(model, run, seed)
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Every rank starts from the same weights by construction: nothing to send round.
        with warnings.catch_warnings():
            # The successor of broadcast_buffers is not in the oldest supported torch.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            wrapped = _TransparentDDP(
                model, device_ids=ids, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        wrapped.register_comm_hook(None, _sum_hook)
        return wrapped

    def _shards(self) -> Shards:
        return WholeTensors(dist.group.WORLD)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.model, DistributedDataParallel)
        return nullcontext() if last else self.model.no_sync()

    def unsharded(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.bare)


class _TransparentDDP(DistributedDataParallel):
    """DDP that also offers what the model inside offers, such as `head`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


# DDP reads the annotations of a hook, hence this module does not postpone their evaluation.
def _sum_hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum over ranks, where DDP's own hook would take the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
