"""Plans of mixers with a linear recurrence per head."""

from __future__ import annotations

from llm.blocks.mixers.retention import RetentionConfig
from llm.parallel.plan import ParallelPlan, plan_for


@plan_for(RetentionConfig)
def _retention(config: RetentionConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused="A head's decay follows from its index, which a rank with some of the heads lacks.")
