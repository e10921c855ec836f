"""Plan of complex-vector attention: as attention; the phase map is split by heads with the projections."""

from __future__ import annotations

from llm.blocks.mixers.complexformer import ComplexFormerConfig
from llm.parallel.plan import ParallelPlan, TPStyle, plan_for
from llm.parallel.plans.dense import PERSISTENT


@plan_for(ComplexFormerConfig)
def _complexformer(config: ComplexFormerConfig) -> ParallelPlan:
    if config.n_persistent:
        return ParallelPlan(tp_refused=PERSISTENT)
    styles: dict[str, TPStyle] = {
        "q": "colwise",
        "k": "colwise",
        "v": "colwise",
        "out": "rowwise",
        "*_norm": "replicate",
        "phase": "colwise" if config.adapt == "head" else "replicate",
    }
    return ParallelPlan(tp=styles, divides=("n_heads", "n_kv_heads"), fp32_params=("*.phase.*",))
