"""Plans of nested feed-forward layers and of the wrapper that trains them."""

from __future__ import annotations

from llm.blocks.channels.nested import NestedGatedConfig, NestedMLPConfig
from llm.models.wrappers.nested import NestedTrainingConfig
from llm.parallel.plan import ParallelPlan, plan_for

_ORDER = (
    "The first units of a nested layer would all lie on the first ranks: its rows must be interleaved so that every "
    "rank holds its share of each granularity."
)


@plan_for(NestedMLPConfig)
def _mlp(config: NestedMLPConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused=_ORDER)


@plan_for(NestedGatedConfig)
def _gated(config: NestedGatedConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused=_ORDER)


@plan_for(NestedTrainingConfig)
def _training(config: NestedTrainingConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused=_ORDER)
