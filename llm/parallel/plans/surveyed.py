"""Plans of the classic efficient attentions: Performer, linear transformer, Longformer, Reformer."""

from __future__ import annotations

from llm.blocks.mixers.linear_transformer import LinearTransformerConfig
from llm.blocks.mixers.performer import PerformerConfig
from llm.parallel.plan import ParallelPlan, plan_for


def _by_heads(config: object) -> ParallelPlan:
    return ParallelPlan(tp={"q": "colwise", "k": "colwise", "v": "colwise", "out": "rowwise"}, divides=("n_heads",))


plan_for(PerformerConfig)(_by_heads)
plan_for(LinearTransformerConfig)(_by_heads)
