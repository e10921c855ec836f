"""Simplified linear attention against the explicit T x T form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.mixers.slab import SimplifiedLinearAttentionConfig
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

B, T, D, H = 2, 70, 32, 4
"""Longer than a chunk of the kernel."""


def mixer(**changes: Any) -> Any:
    return ready(SimplifiedLinearAttentionConfig(n_heads=H, **changes).build(context(max_seq_len=128)))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(heads' outputs [B, T, H, d] before the projection, scores [B, H, T, T])."""
    q, k, v = (f(x).unflatten(-1, (H, -1)) for f in (m.q, m.k, m.v))
    q, k = F.relu(q), F.relu(k)
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    y = torch.einsum("bhts,bshd->bthd", weights, v)
    if m.conv is not None:
        taps = m.conv.weight[:, 0]
        padded = F.pad(v, (0, 0, 0, 0, 4, 0))
        y = y + sum(padded[:, j : j + T] * taps[:, j] for j in range(5)) + m.conv.bias
    return y, scores.detach()


@pytest.mark.parametrize("conv_width", [5, None])
def test_both_orders_of_evaluation_agree(conv_width: int | None) -> None:
    """q (kᵀ v), as the mixer has it, and (q kᵀ) v."""
    m = mixer(conv_width=conv_width)
    x = inputs()
    y, scores = explicit(m, x)
    torch.testing.assert_close(m(x, SeqInfo.contiguous(B, T)), m.out(y.flatten(2)), rtol=0, atol=1e-10)
    sums = scores.sum(-1)
    rows = sums / (sums + 1e-6)
    assert bool((scores >= 0).all()) and bool((rows[sums > 0.01] > 1 - 1e-4).all())
    assert float((sums > 0.01).double().mean()) > 0.9


def test_the_convolution_is_the_same_for_all_heads_and_torchs() -> None:
    m = mixer()
    v = inputs()
    theirs = torch.nn.Conv1d(D // H, D // H, 5, groups=D // H).double()
    theirs.load_state_dict(m.conv.state_dict())
    wanted = torch.cat([theirs(F.pad(h.transpose(1, 2), (4, 0))).transpose(1, 2) for h in v.chunk(H, -1)], -1)
    torch.testing.assert_close(m.conv(v, SeqInfo.contiguous(B, T)), wanted, rtol=0, atol=1e-12)


def test_order_of_earlier_tokens_does_not_matter_without_positions() -> None:
    for changes, same in (({"conv_width": None}, True), ({}, False), ({"key_positions": True}, False)):
        m = mixer(**changes)
        if m.key_position is not None:
            with torch.no_grad():
                m.key_position.normal_()
        x = inputs()
        moved = torch.cat([x[:, torch.randperm(T - 1, generator=torch.Generator().manual_seed(1))], x[:, -1:]], 1)
        first, second = (m(y, SeqInfo.contiguous(B, T))[:, -1] for y in (x, moved))
        assert torch.allclose(first, second, rtol=0, atol=1e-10) == same


def test_a_query_of_zeros_reads_the_convolution_alone() -> None:
    m = mixer()
    with torch.no_grad():
        m.q.weight.zero_(), m.q.bias.fill_(-1.0)
    x = inputs()
    wanted = m.out(m.conv(m.v(x), SeqInfo.contiguous(B, T)))
    torch.testing.assert_close(m(x, SeqInfo.contiguous(B, T)), wanted, rtol=0, atol=1e-12)


def test_key_positions_restart_with_documents_and_end() -> None:
    m = mixer(key_positions=True)
    with torch.no_grad():
        m.key_position.normal_()
    x = inputs()[:1]
    packed = m(x, SeqInfo.from_lengths([[30, 40]], T))
    alone = [m(part, SeqInfo.contiguous(1, part.shape[1])) for part in (x[:, :30], x[:, 30:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-10)
    with pytest.raises(UserError, match="longer than the table of key positions of 128"):
        m(inputs(), SeqInfo.contiguous(B, T, start=100))
