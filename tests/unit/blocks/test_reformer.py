"""Causal LSH attention against its definition, against full attention, and its state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.blocks.mixers.reformer import Reformer, ReformerConfig, normalised
from llm.blocks.positions import AlibiConfig, NoPositionConfig
from llm.blocks.rope import RopeConfig
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

B, T, D, H = 2, 41, 32, 2
PACKED = SeqInfo.from_lengths([[5, 1, 35], [23, 18]], T)
WHOLE = SeqInfo.contiguous(B, T)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixer(**changes: Any) -> Any:
    position = changes.pop("position", NoPositionConfig())
    config = ReformerConfig(**({"n_heads": H, "n_buckets": 4, "n_hashes": 3, "window": 6} | changes))
    return ready(config.build(context(position_config=position)))


def explicit(m: Reformer, x: Tensor, seq: SeqInfo) -> Tensor:
    """Heads' outputs, token by token: rounds apart, joined by their log-sum-exps."""
    q, v = (f(x).unflatten(-1, (H, -1)) for f in (m.qk, m.v))
    q, _ = m.position.at_qk(q, q, seq)
    k = q / q.norm(dim=-1, keepdim=True)
    out = torch.zeros_like(v)
    for b in range(B):
        for i in range(T):
            start = i - int(seq.positions[b, i])
            for h in range(H):
                rounds = []
                for r in range(m.config.n_hashes):
                    turned = q[b, :, h] @ m.rotations[r]
                    bucket = torch.cat([turned, -turned], -1).argmax(-1)
                    keys = [j for j in range(start, i + 1) if bucket[j] == bucket[i]][-m.config.window :]
                    others = [j for j in keys if j != i]
                    scores = k[b, others, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
                    if m.slopes is not None:
                        scores = scores - m.slopes[h] * (i - torch.tensor(others, dtype=x.dtype))
                    rounds.append((scores, others))
                scores = torch.cat([s for s, _ in rounds])
                index = [j for _, others in rounds for j in others]
                if not index:
                    out[b, i, h] = v[b, i, h]
                    continue
                lses = torch.stack([s.logsumexp(0) if len(s) else torch.tensor(-math.inf).double() for s, _ in rounds])
                for (s, others), weight in zip(rounds, (lses - lses.logsumexp(0)).exp()):
                    if others:
                        out[b, i, h] += weight * (s.softmax(0) @ v[b, others, h])
    return out


@pytest.mark.parametrize("seq", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_hashes": 1, "window": 3},
        {"n_buckets": 16, "window": 50},
        {"position": AlibiConfig()},
        {"position": RopeConfig()},
    ],
)
def test_equals_the_definition(changes: dict[str, Any], seq: SeqInfo) -> None:
    m, x = mixer(**changes), inputs()
    with torch.no_grad():
        torch.testing.assert_close(m(x, seq), m.out(explicit(m, x, seq).flatten(2)), rtol=0, atol=1e-10)


def full(m: Reformer, x: Tensor) -> Tensor:
    """Softmax attention with shared queries and keys, a token itself left out but for the first."""
    q, v = (f(x).unflatten(-1, (H, -1)) for f in (m.qk, m.v))
    scores = torch.einsum("bthd,bshd->bhts", q, normalised(q)) * m.scale
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    scores = torch.where(torch.eye(T).bool(), -1e4, scores)
    return m.out(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))


def test_one_bucket_is_full_attention() -> None:
    m, x = mixer(window=T, n_hashes=2), inputs()
    with torch.no_grad():
        m.rotations.zero_()
        torch.testing.assert_close(m(x, WHOLE), full(m, x), rtol=0, atol=1e-10)


def test_error_against_full_attention_falls_with_rounds() -> None:
    """With sharp attention to a few near tokens, as the method is meant for."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randn(8, D, generator=rng, dtype=torch.float64)
    chosen = torch.randint(8, (B, T), generator=rng)
    x = 4 * kinds[chosen] + 0.5 * torch.randn(B, T, D, generator=rng, dtype=torch.float64)
    errors = []
    for n_hashes in (1, 2, 4, 8):
        found = []
        for seed in range(8):
            m = ready(
                ReformerConfig(n_heads=H, n_buckets=8, n_hashes=n_hashes, window=T).build(
                    context(position_config=NoPositionConfig())
                ),
                seed=seed,
            )
            with torch.no_grad():
                found.append(float((m(x, WHOLE) - full(m, x)).square().mean()))
        errors.append(sum(found) / len(found))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0], errors


def test_near_vectors_share_buckets() -> None:
    m = mixer(n_buckets=16, n_hashes=64)
    x = torch.randn(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shares = [float((m.hash(x) == m.hash(x + scale * noise)).double().mean()) for scale in (0.0, 0.1, 0.5, 2.0)]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True) and shares[1] > 0.8 > 0.3 > shares[3]
    assert torch.equal(m.hash(3 * x), m.hash(x)) and int(m.hash(x).max()) == 15


def test_padding_that_does_not_fit_the_state() -> None:
    """A ragged prefill whose padding reaches beyond the capacity keeps the last real token's bucket."""
    m, x = mixer(), inputs()
    state = m.new_state(2, 12, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        m.prefill(x[:, :4], SeqInfo.contiguous(2, 4), state)
        valid = torch.arange(8) < torch.tensor([[8], [3]])
        m.prefill(x[:, 4:12], SeqInfo(SeqInfo.contiguous(2, 8, start=4).positions, valid=valid), state)
        valid = torch.arange(5) < torch.tensor([[0], [5]])
        seq = SeqInfo(SeqInfo.contiguous(2, 5, start=state.end()).positions, valid=valid)
        found = m.prefill(x[:, 7:12], seq, state)[1]
    wanted = m(x[1:, :12], SeqInfo.contiguous(1, 12))[0, 7:].detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_an_odd_number_of_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="n_buckets must be even"):
        ReformerConfig(n_heads=2, n_buckets=5)
