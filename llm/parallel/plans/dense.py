"""Plans of softmax attention, feed-forward layers, mixture of experts and the dense linear."""

from __future__ import annotations

from llm.blocks.channels.gated import GatedConfig, GeGLUConfig, SwiGLUConfig
from llm.blocks.channels.mlp import MLPConfig
from llm.blocks.channels.moe import MoEConfig
from llm.blocks.linears.dense import DenseLinearConfig
from llm.blocks.mixers.attention import AttentionConfig
from llm.parallel.plan import ParallelPlan, TPStyle, plan_for

PERSISTENT = "Every rank holds all persistent tokens and the keys of its own heads alone, which no plan says yet."


@plan_for(AttentionConfig)
def _attention(config: AttentionConfig) -> ParallelPlan:
    if not config.out_proj:
        return ParallelPlan(tp_refused="Without an output projection nothing sums the outputs of heads on other ranks.")
    if config.n_persistent:
        return ParallelPlan(tp_refused=PERSISTENT)
    styles: dict[str, TPStyle] = {
        "q": "colwise",
        "k": "colwise",
        "v": "colwise",
        "out": "rowwise",
        "*_norm": "replicate",
    }
    return ParallelPlan(tp=styles, divides=("n_heads", "n_kv_heads"))


def _gated(config: GatedConfig) -> ParallelPlan:
    return ParallelPlan(tp={"gate": "colwise", "up": "colwise", "down": "rowwise"}, divides=("d_hidden",))


plan_for(SwiGLUConfig)(_gated)
plan_for(GeGLUConfig)(_gated)


@plan_for(MLPConfig)
def _mlp(config: MLPConfig) -> ParallelPlan:
    return ParallelPlan(tp={"up": "colwise", "down": "rowwise"}, divides=("d_hidden",))


@plan_for(MoEConfig)
def _moe(config: MoEConfig) -> ParallelPlan:
    return ParallelPlan(
        tp_refused="Experts are split over ranks by expert, not by tensor: a grouped product needs whole experts.",
        fp32_params=("*.router.*",),
        ac_keep=frozenset({"aten._grouped_mm"}),
    )


@plan_for(DenseLinearConfig)
def _dense(config: DenseLinearConfig) -> ParallelPlan:
    return ParallelPlan(tp={})
