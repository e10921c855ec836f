"""Plans of wrappers: the decoder inside is split by the plans of its own parts."""

from __future__ import annotations

from llm.models.wrappers.armt import ARMTConfig
from llm.models.wrappers.fit import FITConfig
from llm.models.wrappers.loop import LoopConfig
from llm.models.wrappers.rmt import RMTConfig
from llm.parallel.plan import ParallelPlan, plan_for


@plan_for(LoopConfig)
def _loop(config: LoopConfig) -> ParallelPlan:
    return ParallelPlan(tp={"loop_norm": "replicate"})


@plan_for(RMTConfig)
def _rmt(config: RMTConfig) -> ParallelPlan:
    return ParallelPlan(tp=dict.fromkeys(("q", "k", "v", "out"), "replicate"))


@plan_for(ARMTConfig)
def _armt(config: ARMTConfig) -> ParallelPlan:
    return ParallelPlan(tp={"memories.*": "replicate"})


@plan_for(FITConfig)
def _fit(config: FITConfig) -> ParallelPlan:
    return ParallelPlan(tp=dict.fromkeys(("reads.*", "writes.*", "latent_layers.*"), "replicate"))
