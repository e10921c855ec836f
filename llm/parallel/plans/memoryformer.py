"""Plans of the parts of MemoryFormer."""

from __future__ import annotations

from llm.blocks.channels.memory_ffn import MemoryFFNConfig
from llm.blocks.linears.memory_layer import MemoryLayerConfig
from llm.parallel.plan import ParallelPlan, plan_for

_KEPT = frozenset({"manyformer.memory_lookup"})


@plan_for(MemoryLayerConfig)
def _memory_layer(config: MemoryLayerConfig) -> ParallelPlan:
    return ParallelPlan(
        tp_refused="Tables would be split by table or by output column; the split of a weight matrix does neither.",
        ac_keep=_KEPT,
    )


@plan_for(MemoryFFNConfig)
def _memory_ffn(config: MemoryFFNConfig) -> ParallelPlan:
    return ParallelPlan(
        tp_refused="The norm between the two layers needs every output of the first, which no rank would hold.",
        ac_keep=_KEPT,
    )
