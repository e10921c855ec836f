"""Wide attention: a layer whose heads are wider than the model is a sum over its heads, in any order and grouping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm.blocks.mixers.attention import Attention, AttentionConfig
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.zoo.wide import SWEEPS, count_matrices
from tests.unit.blocks.helpers import context, ready

D, HEADS, WIDTH = 32, 6, 24
"""6 heads of 24: 144 columns for a model width of 32, which 6 does not divide."""


def test_attention_is_constant_and_feed_forward_proportional_to_depth() -> None:
    """Of the config and of the built module; only attention's width changes with the heads."""
    for names in (list(SWEEPS)[:4], list(SWEEPS)[4:]):
        models = [ModelConfig.model_validate({"variant": name}) for name in names]
        counts = [count_matrices(model) for model in models]
        assert len({count["attention"] for count in counts}) == 1
        per_layer = {count["feed-forward"] / model.n_layers for count, model in zip(counts, models)}
        assert len(per_layer) == 1
        for name, model, count in zip(names, models, counts):
            n_layers, n_heads, d, a, f = SWEEPS[name]
            built = dict(model.build("meta").named_parameters())
            mixer = sum(p.numel() for part, p in built.items() if ".mixer." in part)
            channel = sum(p.numel() for part, p in built.items() if ".channel." in part)
            assert (mixer, channel) == (count["attention"], count["feed-forward"])
            assert (mixer, channel) == (n_layers * 4 * d * n_heads * a, n_layers * 2 * d * f)
    deep, wide = (
        count_matrices(ModelConfig.model_validate({"variant": n}))["both"] for n in ("aspect-6x8", "aspect-1x48")
    )
    assert (deep, wide) == (18_874_368, 8_388_608)


def wide_layer() -> Attention:
    return ready(AttentionConfig(n_heads=HEADS, d_head=WIDTH).build(context(D)))


def run(layer: Attention, x: Tensor) -> Tensor:
    seq = SeqInfo.from_lengths([[4, 5], [9]], 9)
    layer.prepare(seq, x.dtype)
    return layer(x, seq)


def heads(layer: Attention, chosen: list[int]) -> Attention:
    """A layer of some of the heads of another."""
    part = AttentionConfig(n_heads=len(chosen), d_head=WIDTH).build(context(D)).double()
    with torch.no_grad():
        for name in ("q", "k", "v"):
            rows = getattr(layer, name).weight.unflatten(0, (HEADS, WIDTH))[chosen]
            getattr(part, name).weight.copy_(rows.flatten(0, 1))
        part.out.weight.copy_(layer.out.weight.unflatten(1, (HEADS, WIDTH))[:, chosen].flatten(1))
    return part


@torch.no_grad()
def test_heads_in_another_order_are_the_same_layer() -> None:
    layer, x = wide_layer(), torch.randn(2, 9, D, dtype=torch.float64)
    torch.testing.assert_close(run(heads(layer, [3, 0, 5, 1, 4, 2]), x), run(layer, x))
    assert not torch.allclose(run(heads(layer, [3, 0, 5, 1, 4, 4]), x), run(layer, x))


@pytest.mark.parametrize("size", [1, 2, 3])
@torch.no_grad()
def test_groups_of_heads_add_up(size: int) -> None:
    """What tensor parallelism rests on; with groups of one, each head's own part of the output can be told apart."""
    layer, x = wide_layer(), torch.randn(2, 9, D, dtype=torch.float64)
    groups = [heads(layer, list(range(start, start + size))) for start in range(0, HEADS, size)]
    torch.testing.assert_close(sum(run(group, x) for group in groups), run(layer, x))
