"""Random features against the softmax kernel and softmax attention; the linear transformer against its square form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.mixers.attention import AttentionConfig
from llm.blocks.mixers.linear_transformer import LinearTransformerConfig
from llm.blocks.mixers.performer import FLOOR, PerformerConfig, orthogonal_directions, running_max
from llm.blocks.positions import AlibiConfig
from llm.blocks.rope import RopeConfig
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

B, T, D, H = 2, 70, 32, 2
SEQ = SeqInfo.contiguous(B, T)


def performer(**changes: Any) -> Any:
    position = changes.pop("position", RopeConfig())
    return ready(PerformerConfig(n_heads=H, **changes).build(context(max_seq_len=128, position_config=position)))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alibi_factors(m: Any) -> Tensor:
    """[H, T, T] exp(-slope * distance), or 1."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    slopes = torch.tensor(m.slopes or [0.0] * H, dtype=torch.float64)
    return (-slopes[:, None, None] * distance.clamp(min=0)).exp()


def test_directions_are_orthogonal_with_gaussian_lengths() -> None:
    rng = torch.Generator().manual_seed(0)
    w = orthogonal_directions((20, 8), rng).double()
    unit = w / w.norm(dim=-1, keepdim=True)
    for block in unit.split(8):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64), rtol=0, atol=1e-6)
    many = orthogonal_directions((8 * 20000, 8), rng)
    lengths = many.norm(dim=-1).square()
    assert float(lengths.mean()) == pytest.approx(8.0, rel=0.01) and float(lengths.var()) == pytest.approx(16, rel=0.05)
    torch.testing.assert_close(many[::8].T @ many[::8] / 20000, torch.eye(8), rtol=0, atol=0.05)
    torch.testing.assert_close(many[::8].mean(0), torch.zeros(8), rtol=0, atol=0.03)


def test_features_estimate_the_softmax_kernel_without_bias() -> None:
    """The mean over draws is exp(q·k) within its error, and orthogonal directions err less than independent ones."""
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(8, generator=rng, dtype=torch.float64)
    q = k = 0.5 * q / q.norm()
    wanted = float((q @ k).exp())

    def estimates(w: Tensor) -> Tensor:
        w = w.double().view(-1, 8, 8)
        features = [(w @ x - x.square().sum() / 2).exp() for x in (q, k)]
        return (features[0] * features[1]).mean(-1)

    orthogonal = estimates(orthogonal_directions((8 * 20000, 8), rng))
    independent = estimates(torch.randn(8 * 20000, 8, generator=rng))
    for found in (orthogonal, independent):
        error = float(found.std()) / math.sqrt(len(found))
        assert abs(float(found.mean()) - wanted) < 4 * error < 0.1 * wanted
    assert float(orthogonal.var()) < 0.95 * float(independent.var())


@pytest.mark.parametrize("position", [RopeConfig(), AlibiConfig()], ids=["rope", "alibi"])
@pytest.mark.parametrize("starts", [None, [[30, 40], [1, 9, 60]]])
def test_equals_the_square_form(starts: Any, position: Any) -> None:
    """Softmax replaced by the estimate, without any scaling of features, in every document; then by steps."""
    m, x = performer(position=position), inputs()
    seq = SEQ if starts is None else SeqInfo.from_lengths(starts, T)
    q, k, v = (f(x).unflatten(-1, (H, -1)) for f in (m.q, m.k, m.v))
    q, k = m.position.at_qk(q, k, seq)
    q, k = (m.log_features(y * m.d_head**-0.25).exp() for y in (q, k))
    same = (seq.document_ids()[:, :, None] == seq.document_ids()[:, None]).tril()
    weights = torch.einsum("bthm,bshm->bhts", q, k) * same[:, None] * alibi_factors(m)
    weights = weights / weights.sum(-1, keepdim=True)
    wanted = m.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)).detach()
    torch.testing.assert_close(m(x, seq), wanted, rtol=0, atol=1e-9)
    if starts is None:
        state = m.new_state(B, T, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            parts = [
                m.prefill(x[:, a:b], SeqInfo.contiguous(B, b - a, start=a), state)
                for a, b in ((0, 30), (30, 31), (31, 32), (32, 70))
            ]
        torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-9)


def test_error_against_softmax_attention_falls_as_one_over_root_m() -> None:
    """The same weights, queries and keys of moderate norm."""
    exact = ready(AttentionConfig(n_heads=H).build(context(max_seq_len=128)))
    with torch.no_grad():
        for part in (exact.q, exact.k):
            part.weight.mul_(0.4)
    x = inputs()
    wanted = exact(x, SEQ).detach()
    errors = []
    counts = (32, 128, 512, 2048)
    for m in counts:
        found = []
        for seed in range(6):
            mixer = performer(n_features=m)
            state = dict(exact.state_dict())
            state["directions"] = orthogonal_directions((m, D // H), torch.Generator().manual_seed(seed)).double()
            mixer.load_state_dict(state)
            found.append(float((mixer(x, SEQ).detach() - wanted).square().mean()))
        errors.append(math.sqrt(sum(found) / len(found)))
    slope = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert -0.65 < slope < -0.35, (slope, errors)
    assert errors[-1] < 0.1 * float(wanted.std())


def test_large_keys_neither_overflow_nor_vanish() -> None:
    m = performer().float()
    x = inputs().float()
    for scale in (1e-3, 30.0, 1e3):
        with torch.no_grad():
            whole = m(scale * x, SEQ)
        assert bool(torch.isfinite(whole).all())
        state = m.new_state(B, T, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            parts = [
                m.prefill(scale * x[:, a:b], SeqInfo.contiguous(B, b - a, start=a), state)
                for a, b in ((0, 40), (40, 41), (41, 70))
            ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3 * scale)


def test_running_max() -> None:
    x = inputs()[..., :3]
    starts = SeqInfo.from_lengths([[30, 1, 39], [70]], T).starts()
    wanted = torch.cat([part.cummax(1).values for part in x[:1].split((30, 1, 39), 1)], 1)
    torch.testing.assert_close(running_max(x, starts)[:1], wanted, rtol=0, atol=0)
    torch.testing.assert_close(running_max(x, starts)[1:], running_max(x[1:], None), rtol=0, atol=0)
    assert FLOOR > math.log(torch.finfo(torch.float32).tiny)


def test_redraws_depend_on_seed_and_step_alone() -> None:
    """A resumed process draws the same; the first features are the initial ones."""
    straight = performer(redraw_every=10)
    initial = straight.directions.clone()
    seen = []
    for step in range(35):
        before_step(straight, Progress(step, 100, 7))
        seen.append(straight.directions.clone())
    assert torch.equal(seen[9], initial) and not torch.equal(seen[10], initial)
    assert torch.equal(seen[10], seen[19]) and not torch.equal(seen[19], seen[20])
    resumed = performer(redraw_every=10)
    resumed.load_state_dict(straight.state_dict() | {"directions": seen[24]})
    before_step(resumed, Progress(25, 100, 7))
    assert torch.equal(resumed.directions, seen[25])
    other_seed, never = performer(redraw_every=10), performer(redraw_every=None)
    for m in (other_seed, never):
        before_step(m, Progress(25, 100, 8))
    assert not torch.equal(other_seed.directions, seen[25]) and torch.equal(never.directions, initial)


@pytest.mark.parametrize("position", [RopeConfig(), AlibiConfig()], ids=["rope", "alibi"])
def test_linear_transformer_equals_the_square_form(position: Any) -> None:
    m = ready(LinearTransformerConfig(n_heads=H).build(context(max_seq_len=128, position_config=position)))
    x = inputs()
    q, k, v = (f(x).unflatten(-1, (H, -1)) for f in (m.q, m.k, m.v))
    q, k = (F.elu(y) + 1 for y in m.position.at_qk(q, k, SEQ))
    weights = torch.einsum("bthd,bshd->bhts", q, k).tril() * alibi_factors(m)
    wanted = torch.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(m(x, SEQ), m.out(wanted.flatten(2)), rtol=0, atol=1e-5)
