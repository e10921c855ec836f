"""From a RunConfig to its strategy."""

from __future__ import annotations

from llm.core.errors import UserError
from llm.parallel.mesh import find_place, join
from llm.train.config import RunConfig
from llm.train.strategies.base import Strategy


def make_strategy(run: RunConfig) -> Strategy:
    """The strategy that `run.parallel` names, on the processes that torchrun started; joins their group.

    UserError when the strategy and the number of processes do not fit.
    """
    name = run.parallel.strategy
    place = find_place(run.train.device)
    if name == "single":
        if place.world_size > 1:
            raise UserError(
                f"parallel.strategy=single, but {place.world_size} processes were started; set parallel.strategy to "
                "ddp, fsdp2 or deepspeed, or start one process"
            )
        from llm.train.strategies.single import SingleStrategy

        return SingleStrategy(place)
    if place.world_size % run.parallel.replicate:
        raise UserError(f"parallel.replicate {run.parallel.replicate} does not divide the {place.world_size} processes")
    owns_group = join(place)
    if name == "ddp":
        from llm.train.strategies.ddp import DDPStrategy

        return DDPStrategy(place, owns_group=owns_group)
    if name == "fsdp2":
        from llm.train.strategies.fsdp2 import FSDP2Strategy

        return FSDP2Strategy(place, run.parallel, owns_group=owns_group)
    from llm.train.strategies.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(place, run.parallel, owns_group=owns_group)
