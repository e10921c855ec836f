"""Plans of Activator's gating unit over channels and over positions."""

from __future__ import annotations

from llm.blocks.channels.activator import ActivatorConfig
from llm.blocks.mixers.glu_token_mixing import GLUTokenMixingConfig
from llm.parallel.plan import ParallelPlan, plan_for


@plan_for(ActivatorConfig)
def _activator(config: ActivatorConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused="Its LayerNorm needs whole hidden vectors, so the hidden width is not split.")


@plan_for(GLUTokenMixingConfig)
def _glu_token_mixing(config: GLUTokenMixingConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused="Its matrices mix positions and have no width to split.")
