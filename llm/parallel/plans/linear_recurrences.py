"""Plans of mixers with a linear recurrence per head."""

from __future__ import annotations

from llm.blocks.mixers.delta_net import DeltaConfig, DeltaNetConfig, GatedDeltaNetConfig
from llm.blocks.mixers.mamba2 import Mamba2Config
from llm.blocks.mixers.retention import RetentionConfig
from llm.parallel.plan import ParallelPlan, plan_for


@plan_for(RetentionConfig)
def _retention(config: RetentionConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused="A head's decay follows from its index, which a rank with some of the heads lacks.")


def _delta(config: DeltaConfig) -> ParallelPlan:
    return ParallelPlan(
        tp_refused="Queries, keys and values share one convolution, which a split of the linears would not divide.",
        fp32_params=("*.time_step.*",),
        ac_keep=frozenset({"aten.linalg_solve_triangular"}),
    )


plan_for(DeltaNetConfig)(_delta)
plan_for(GatedDeltaNetConfig)(_delta)


@plan_for(Mamba2Config)
def _mamba2(config: Mamba2Config) -> ParallelPlan:
    return ParallelPlan(
        tp_refused="x, B and C share one convolution and the norm spans a group: a split of the linears is not enough.",
        fp32_params=("*.time_step.*",),
    )
