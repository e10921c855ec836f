"""Plan of EcoFormer's attention."""

from __future__ import annotations

from llm.blocks.mixers.ecoformer import EcoFormerConfig
from llm.parallel.plan import ParallelPlan, plan_for


@plan_for(EcoFormerConfig)
def _ecoformer(config: EcoFormerConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused="Anchors and hash functions are buffers over all heads, which are not split.")
