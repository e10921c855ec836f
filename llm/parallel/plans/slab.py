"""Plan of simplified linear attention."""

from __future__ import annotations

from llm.blocks.mixers.slab import SimplifiedLinearAttentionConfig
from llm.parallel.plan import ParallelPlan, plan_for


@plan_for(SimplifiedLinearAttentionConfig)
def _slab(config: SimplifiedLinearAttentionConfig) -> ParallelPlan:
    if config.key_positions:
        return ParallelPlan(tp_refused="The table of key positions is one parameter over all heads, not split.")
    return ParallelPlan(
        tp={"q": "colwise", "k": "colwise", "v": "colwise", "conv": "replicate", "out": "rowwise"},
        divides=("n_heads",),
    )
