"""Plans of memories that learn while they read."""

from __future__ import annotations

from llm.blocks.mixers.exponential_memory import ExponentialMemoryConfig
from llm.blocks.mixers.memory_as_context import MemoryAsContextConfig
from llm.blocks.mixers.memory_hybrids import HybridConfig, MemoryAsGateConfig, MemoryAsLayerConfig
from llm.blocks.mixers.test_time_memory import MemoryConfig
from llm.parallel.plan import ParallelPlan, plan_for

REFUSED = (
    "Initial memories, gates and the common convolution are parameters of all heads, which no split of linears divides."
)


@plan_for(MemoryConfig)
def _test_time_memory(config: MemoryConfig) -> ParallelPlan:
    return ParallelPlan(
        tp_refused=REFUSED,
        fp32_params=("*.gates.bias.bias",),
        ac_keep=frozenset({"aten.bmm", "aten.linalg_solve_triangular"}),
    )


def _hybrid(config: HybridConfig | MemoryAsContextConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused=REFUSED)


plan_for(MemoryAsGateConfig)(_hybrid)
plan_for(MemoryAsLayerConfig)(_hybrid)
plan_for(MemoryAsContextConfig)(_hybrid)


@plan_for(ExponentialMemoryConfig)
def _exponential_memory(config: ExponentialMemoryConfig) -> ParallelPlan:
    return ParallelPlan(
        tp_refused=REFUSED,
        fp32_params=("*.gates.bias.bias", "*.core.log_scale"),
        ac_keep=frozenset({"aten.bmm", "aten.linalg_solve_triangular"}),
    )
