"""Plans of the LMUFormer's parts."""

from __future__ import annotations

from llm.blocks.channels.conv_channel import ConvChannelConfig, SpikingConvChannelConfig
from llm.blocks.mixers.conv_embed import ConvEmbedConfig
from llm.blocks.mixers.lmu import LMUConfig
from llm.blocks.mixers.lmu_spiking import SpikingLMUConfig
from llm.parallel.plan import ParallelPlan, plan_for


def _memory(config: LMUConfig | SpikingLMUConfig) -> ParallelPlan:
    return ParallelPlan(
        tp_refused="The read-out takes the memories of all channels and the token in one product, which has no split "
        "by channel without a second one."
    )


plan_for(LMUConfig)(_memory)
plan_for(SpikingLMUConfig)(_memory)


def _channel(config: ConvChannelConfig | SpikingConvChannelConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused="The norm over the hidden units needs all of them on one rank.")


plan_for(ConvChannelConfig)(_channel)
plan_for(SpikingConvChannelConfig)(_channel)


@plan_for(ConvEmbedConfig)
def _embed(config: ConvEmbedConfig) -> ParallelPlan:
    return ParallelPlan(tp_refused="Each convolution needs all channels of the one before it, so no pair can be split.")
