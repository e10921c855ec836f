"""Plans of the parts of TokenFormer."""

from __future__ import annotations

from llm.blocks.channels.token_ffn import TokenFFNConfig
from llm.blocks.linears.pattention import PattentionConfig
from llm.parallel.plan import ParallelPlan, plan_for

_REFUSED = (
    "The scores are divided by their norm over all parameter tokens, a sum over ranks in the middle of the layer."
)


@plan_for(PattentionConfig)
def _pattention(config: PattentionConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused=_REFUSED)


@plan_for(TokenFFNConfig)
def _token_ffn(config: TokenFFNConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused=_REFUSED)
