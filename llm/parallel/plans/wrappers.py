"""Plans of wrappers: the decoder inside is split by the plans of its own parts."""

from __future__ import annotations

from llm.models.wrappers.loop import LoopConfig
from llm.parallel.plan import ParallelPlan, plan_for


@plan_for(LoopConfig)
def _loop(config: LoopConfig) -> ParallelPlan:
    return ParallelPlan(tp={"loop_norm": "replicate"})
