"""Causal Longformer against softmax attention with a window and against the explicit mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm.blocks.mixers.attention import AttentionConfig
from llm.blocks.mixers.longformer import LongformerConfig
from llm.blocks.positions import AlibiConfig
from llm.blocks.rope import RopeConfig
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

B, T, D = 2, 41, 32
PACKED = SeqInfo.from_lengths([[5, 1, 35], [23, 18]], T)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixer(**changes: Any) -> Any:
    position = changes.pop("position", RopeConfig())
    return ready(LongformerConfig(**({"n_heads": 4} | changes)).build(context(position_config=position)))


@pytest.mark.parametrize("seq", [SeqInfo.contiguous(B, T), PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("position", [RopeConfig(), AlibiConfig()], ids=["rope", "alibi"])
@pytest.mark.parametrize("n_global", [0, 3])
@pytest.mark.parametrize("window", [1, 6, 64])
def test_without_dilation_it_is_attention_with_a_window_and_sinks(
    seq: SeqInfo, position: Any, n_global: int, window: int
) -> None:
    """Values, input gradients and parameter gradients."""
    ctx = context(position_config=position)
    ours = ready(LongformerConfig(n_heads=4, window=window, n_global=n_global).build(ctx))
    theirs = ready(AttentionConfig(n_heads=4, window=window, n_sinks=n_global, backend="reference").build(ctx))
    theirs.load_state_dict(ours.state_dict())
    upstream = torch.randn(B, T, D, dtype=torch.float64)
    outcomes = []
    for m in (ours, theirs):
        x = inputs().requires_grad_()
        own = SeqInfo(seq.positions, seq.cu_seqlens, seq.max_seqlen)
        m.prepare(own, x.dtype)
        y = m(x, own)
        outcomes.append([y, *torch.autograd.grad(y, [x, *m.parameters()], upstream)])
    for found, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def explicit(m: Any, x: Tensor, seq: SeqInfo) -> Tensor:
    """Token by token from the definition."""
    config = m.config
    q, k, v = (f(x).unflatten(-1, (4, -1)) for f in (m.q, m.k, m.v))
    q, k = m.position.at_qk(q, k, seq)
    own = None
    if m.q_global is not None:
        own = [f(x).unflatten(-1, (4, -1)) for f in (m.q_global, m.k_global, m.v_global)]
        own[:2] = m.position.at_qk(own[0], own[1], seq)
    out = torch.zeros_like(v)
    for b in range(B):
        for i in range(T):
            position = int(seq.positions[b, i])
            start = i - position
            for h in range(4):
                dilation = config.dilations[h * len(config.dilations) // 4]
                keys = {i - dilation * n for n in range(config.window) if i - dilation * n >= start}
                keys |= {start + g for g in range(config.n_global) if start + g <= i}
                q_, k_, v_ = q, k, v
                if own is not None and position < config.n_global:
                    keys = set(range(start, i + 1))
                    q_, k_, v_ = own
                index = sorted(keys)
                scores = k_[b, index, h] @ q_[b, i, h] * m.scale
                if m.slopes is not None:
                    scores = scores - m.slopes[h] * (i - torch.tensor(index, dtype=x.dtype))
                out[b, i, h] = scores.softmax(0) @ v_[b, index, h]
    return m.out(out.flatten(2))


@pytest.mark.parametrize("seq", [SeqInfo.contiguous(B, T), PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {"window": 4, "dilations": (1, 3)},
        {"window": 3, "dilations": (5,), "n_global": 2},
        {"window": 3, "dilations": (1, 2, 4, 8), "n_global": 4, "global_projections": True},
        {"window": 50, "n_global": 50, "global_projections": True},
        {"window": 3, "dilations": (1, 2), "n_global": 2, "global_projections": True, "position": AlibiConfig()},
    ],
)
def test_equals_the_definition(changes: dict[str, Any], seq: SeqInfo) -> None:
    m, x = mixer(**changes), inputs()
    with torch.no_grad():
        torch.testing.assert_close(m(x, seq), explicit(m, x, seq), rtol=0, atol=1e-10)


def test_memory_does_not_grow_with_the_context() -> None:
    m = mixer(window=4, dilations=(1, 3), n_global=2)
    sizes = {m.new_state(1, n, dtype=torch.float32, device="cpu").nbytes() for n in (100, 1000)}
    assert sizes == {2 * 32 * 4 * (10 + 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dilations": (0,)}, "must be 1 or more"),
        ({"dilations": (1, 2, 3)}, "not divisible by the number of dilations"),
        ({"global_projections": True}, "no effect with n_global: 0"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(**changes)
