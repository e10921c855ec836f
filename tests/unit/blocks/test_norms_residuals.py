"""Norms against their formulas and transformers; residual styles against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm.blocks.base import RESIDUALS
from llm.blocks.norms import LayerNormConfig, RMSNormConfig
from llm.blocks.residuals import ParallelResidualConfig
from tests.unit.blocks.helpers import context, ready

D = 16


def test_rms_norm_equals_llama() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = ready(RMSNormConfig(eps=1e-6).build(D), torch.float32), LlamaRMSNorm(D, 1e-6)
    theirs.weight.data.copy_(ours.weight)
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "config", [LayerNormConfig(), LayerNormConfig(bias=False), LayerNormConfig(affine=False, bias=False)]
)
def test_layer_norm(config: LayerNormConfig) -> None:
    module = ready(config.build(D))
    x = torch.randn(2, 3, D, dtype=torch.float64)
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.eps).sqrt()
    if module.weight is not None:
        wanted = wanted * module.weight
    if module.bias is not None:
        wanted = wanted + module.bias
    torch.testing.assert_close(module(x), wanted)
    assert sum(p.numel() for p in module.parameters()) == config.cost(D).params


def test_bias_without_affine_is_refused() -> None:
    with pytest.raises(ValueError, match="no effect with affine"):
        LayerNormConfig(affine=False, bias=True)


def formulas(r: Any, mix: Any, chan: Any, x: Tensor) -> dict[str, Tensor]:
    """What each style computes, from the modules of the residual `r` (looked up when they exist)."""

    def of(name: str) -> Any:
        return getattr(r, name, None) or (lambda y: y)

    pre = x + mix(of("mixer_norm")(x))
    post = of("mixer_sum_norm")(x + mix(x))
    sandwich = x + of("mixer_post_norm")(mix(of("mixer_norm")(x)))
    return {
        "pre": pre + chan(of("channel_norm")(pre)),
        "post": of("channel_sum_norm")(post + chan(post)),
        "sandwich": sandwich + of("channel_post_norm")(chan(of("channel_norm")(sandwich))),
        "parallel": x + mix(of("mixer_norm")(x)) + chan(of("channel_norm")(x)),
        "parallel-shared": x + mix(of("mixer_norm")(x)) + chan(of("mixer_norm")(x)),
    }


@pytest.mark.parametrize("label", ["pre", "post", "sandwich", "parallel", "parallel-shared"])
def test_styles(label: str) -> None:
    config = RESIDUALS.entry(label.split("-")[0]).variants()[label]()
    residual = ready(config.build(context(D), mixer=True, channel=True))
    a, b = (0.3 * torch.randn(D, D, dtype=torch.float64) for _ in range(2))
    x = torch.randn(2, 3, D, dtype=torch.float64)
    found = residual(x, lambda y: y @ a, lambda y: torch.tanh(y) @ b)
    wanted = formulas(residual, lambda y: y @ a, lambda y: torch.tanh(y) @ b, x)[label]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("label", ["pre", "post", "sandwich", "parallel", "parallel-shared"])
@pytest.mark.parametrize(("mixer", "channel"), [(True, True), (True, False), (False, True)])
def test_parameters_as_counted_and_absent_parts(label: str, mixer: bool, channel: bool) -> None:
    config = RESIDUALS.entry(label.split("-")[0]).variants()[label]()
    residual = ready(config.build(context(D), mixer=mixer, channel=channel))
    cost = config.cost(context(D).dims(), mixer=mixer, channel=channel)
    assert cost.params == sum(p.numel() for p in residual.parameters())
    x = torch.randn(1, 2, D, dtype=torch.float64)
    assert residual(x, (lambda y: y) if mixer else None, (lambda y: y) if channel else None).shape == x.shape


@pytest.mark.parametrize("label", ["pre", "post", "sandwich", "parallel", "parallel-shared"])
def test_the_stream_stays_fp32_under_autocast(label: str) -> None:
    config = RESIDUALS.entry(label.split("-")[0]).variants()[label]()
    residual = ready(config.build(context(D), mixer=True, channel=True), torch.float32)
    seen: list[torch.dtype] = []

    def part(y: Tensor) -> Tensor:
        seen.append(y.dtype)
        return y.bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        assert residual(torch.randn(1, 2, D), part, part).dtype == torch.float32
    assert seen == [torch.bfloat16] * 2


def test_shared_norm_is_one() -> None:
    residual = ParallelResidualConfig(shared_norm=True).build(context(D), mixer=True, channel=True)
    assert [name for name, _ in residual.named_parameters()] == ["mixer_norm.weight"]


def test_a_layer_norm_without_weight_is_read_back_from_its_own_words() -> None:
    config = LayerNormConfig(affine=False)
    assert not config.bias and LayerNormConfig.model_validate(config.to_dict()) == config
