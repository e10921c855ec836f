"""Activator's gating unit over channels, and its causal form over positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.channels.activator import ActivatorConfig
from llm.blocks.channels.mlp import MLPConfig
from llm.blocks.mixers.glu_token_mixing import GLUTokenMixingConfig
from llm.blocks.norms import LayerNormConfig
from llm.blocks.residuals import PreNormConfig
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

B, T, D = 2, 13, 32
SEQ = SeqInfo.contiguous(B, T)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channel(**changes: Any) -> Any:
    return ready(ActivatorConfig(d_hidden=24, **changes).build(context()))


def test_formula_with_one_norm_for_both_branches() -> None:
    m, x = channel(), inputs()
    u, v = (F.layer_norm(h, (24,), m.norm.weight, m.norm.bias) for h in (F.gelu(m.gate(x)), m.up(x)))
    torch.testing.assert_close(m(x, SEQ), m.down(u * v))
    assert [name for name, _ in m.named_parameters() if "norm" in name] == ["norm.weight", "norm.bias"]


def test_no_token_reaches_another() -> None:
    m = channel()
    x = inputs().requires_grad_()
    (grad,) = torch.autograd.grad(m(x, SEQ)[:, 4].sum(), x)
    others = torch.arange(T) != 4
    assert bool((grad[:, others] == 0).all()) and bool((grad[:, 4] != 0).any())


def test_special_weights() -> None:
    """W3 = 0 and b3 = 0 make the residual block the identity; W2 = 0 and b2 = 0 make v the norm's bias."""
    m, x = channel(), inputs()
    residual = ready(PreNormConfig().build(context(norm_config=LayerNormConfig()), mixer=False, channel=True))
    with torch.no_grad():
        m.up.weight.zero_(), m.up.bias.zero_()
        u = F.layer_norm(F.gelu(m.gate(x)), (24,), m.norm.weight, m.norm.bias)
        torch.testing.assert_close(m(x, SEQ), m.down(u * m.norm.bias))
        m.norm.bias.zero_()
        torch.testing.assert_close(m(x, SEQ), m.down.bias.expand_as(x))
        m.down.weight.zero_(), m.down.bias.zero_()
    assert torch.equal(residual(x, None, lambda y: m(y, SEQ)), x)


def test_published_counts() -> None:
    """Both published image models, less the patch embedding and the head, from the cost of their blocks' parts."""
    dims = context(256, norm_config=LayerNormConfig()).dims()
    outside = 3 * 4 * 4 * 256 + 256 + 256 * 10 + 10
    norm = LayerNormConfig().cost(256).params
    unit = ActivatorConfig(d_hidden=512).cost(dims, 64, "train").params
    feed_forward = MLPConfig(d_hidden=512, bias=True).cost(dims, 64, "train").params
    assert outside + 4 * (norm + unit) == 1_599_242
    assert outside + 4 * (norm + unit + feed_forward) == 2_650_890


def triangle(rows: Tensor) -> Tensor:
    n = round(((8 * rows.shape[0] + 1) ** 0.5 - 1) / 2)
    square = torch.zeros(n, n, dtype=rows.dtype)
    square[tuple(torch.tril_indices(n, n))] = rows
    return square


@pytest.mark.parametrize("lengths", [[[13], [13]], [[5, 8], [1, 12]]])
def test_token_mixing_is_the_unit_with_triangular_maps(lengths: list[list[int]]) -> None:
    m = ready(GLUTokenMixingConfig(max_positions=16).build(context()))
    with torch.no_grad():
        for name in ("gate_bias", "up_bias", "down_bias"):
            getattr(m, name).normal_()
    x = inputs()

    def mix(name: str, y: Tensor) -> Tensor:
        n = y.shape[0]
        return triangle(getattr(m, name))[:n, :n] @ y + getattr(m, f"{name}_bias")[:n, None]

    rows = []
    for row, parts in zip(x, lengths):
        rows.append(
            torch.cat([mix("down", m.norm(F.gelu(mix("gate", y))) * m.norm(mix("up", y))) for y in row.split(parts)])
        )
    seq = SeqInfo.from_lengths(lengths, T)
    torch.testing.assert_close(m(x, seq), torch.stack(rows), rtol=0, atol=1e-12)
    moved = m(x[:, torch.randperm(T, generator=torch.Generator().manual_seed(0))], seq)
    assert not torch.allclose(moved.sum(1), m(x, seq).sum(1)), "the order of tokens matters here"


def test_beyond_the_last_position() -> None:
    m = ready(GLUTokenMixingConfig(max_positions=12).build(context()))
    with pytest.raises(UserError, match="a sequence of 13 tokens is longer than the position maps of 12"):
        m(inputs(), SEQ)
