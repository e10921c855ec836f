"""Plans of the classic efficient attentions: Performer, linear transformer, Longformer, Reformer."""

from __future__ import annotations

from llm.blocks.mixers.linear_transformer import LinearTransformerConfig
from llm.blocks.mixers.longformer import LongformerConfig
from llm.blocks.mixers.performer import PerformerConfig
from llm.blocks.mixers.reformer import ReformerConfig
from llm.parallel.plan import ParallelPlan, TPStyle, plan_for


def _by_heads(config: object) -> ParallelPlan:
    return ParallelPlan(tp={"q": "colwise", "k": "colwise", "v": "colwise", "out": "rowwise"}, divides=("n_heads",))


@plan_for(ReformerConfig)
def _reformer(config: ReformerConfig) -> ParallelPlan:
    return ParallelPlan(tp={"qk": "colwise", "v": "colwise", "out": "rowwise"}, divides=("n_heads",))


@plan_for(LongformerConfig)
def _longformer(config: LongformerConfig) -> ParallelPlan:
    if len(config.dilations) > 1:
        return ParallelPlan(tp_refused="Heads differ in their dilation, so a rank's share of them is another layer.")
    styles: dict[str, TPStyle] = {"q*": "colwise", "k*": "colwise", "v*": "colwise", "out": "rowwise"}
    return ParallelPlan(tp=styles, divides=("n_heads",))


plan_for(PerformerConfig)(_by_heads)
plan_for(LinearTransformerConfig)(_by_heads)
