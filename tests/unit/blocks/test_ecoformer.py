"""EcoFormer's codes, attention over them, hash fitting and calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm.blocks.base import after_step
from llm.blocks.kernel_hashing import fit_hash_functions, sign_codes, similarity_targets
from llm.blocks.mixers.ecoformer import CENTRE, EcoFormerConfig, normalised
from llm.core.errors import UserError
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

B, T, D, H, BITS = 2, 70, 32, 4, 16
SEQ = SeqInfo.contiguous(B, T)


def mixer(**changes: Any) -> Any:
    return ready(EcoFormerConfig(n_heads=H, **changes).build(context())).eval()


def inputs(seed: int = 0, length: int = T) -> Tensor:
    return torch.randn(B, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes_and_values(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    u, v = (f(x).unflatten(-1, (H, -1)) for f in (m.qk, m.v))
    return m.codes(u).detach(), v


def explicit_codes(m: Any, u: Tensor) -> Tensor:
    """sign(A (K - mean)) with every distance written out."""
    u = u / u.norm(dim=-1, keepdim=True)
    distances = (u[..., None, :] - m.anchors).square().sum(-1)
    features = torch.exp(-distances / (2 * m.sigma[:, None])) - (m.mean + CENTRE)
    z = (features[..., None, :] * m.functions).sum(-1)
    return torch.where(z >= 0, 1.0, -1.0)


def test_codes() -> None:
    m = mixer()
    codes, _ = codes_and_values(m, inputs())
    u = m.qk(inputs()).unflatten(-1, (H, -1))
    assert torch.equal(codes, explicit_codes(m, u).double()) and set(codes.unique().tolist()) == {-1.0, 1.0}
    products = torch.einsum("bthr,bshr->bhts", codes, codes)
    hamming = (codes[:, :, None] != codes[:, None]).sum(-1).permute(0, 3, 1, 2)
    assert torch.equal(products, (BITS - 2 * hamming).double())
    assert bool(torch.isfinite(m.codes(torch.zeros(1, 1, H, 8, dtype=torch.float64))).all())
    assert torch.equal(sign_codes(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("beta", [None, 16.0, 40.0])
def test_linear_form_is_the_square_form(beta: float | None) -> None:
    m = mixer(beta=beta)
    codes, v = codes_and_values(m, inputs())
    used = beta or BITS + 1.0
    scores = (torch.einsum("bthr,bshr->bhts", codes, codes) + used).tril()
    weights = scores / scores.sum(-1, keepdim=True)
    wanted = m.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    torch.testing.assert_close(m(inputs(), SEQ), wanted, rtol=0, atol=1e-10)
    seen = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    least = ((used - BITS) / (seen * (used + BITS))).expand(T, T).tril()
    assert bool((weights >= least - 1e-12).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T, dtype=torch.float64))


def test_official_numerator() -> None:
    """beta times the token's own value alone: the weights do not sum to 1."""
    m = mixer(numerator="official")
    codes, v = codes_and_values(m, inputs())
    products = torch.einsum("bthr,bshr->bhts", codes, codes).tril()
    below = products.sum(-1) + 17.0 * torch.arange(1, T + 1)
    above = torch.einsum("bhts,bshd->bthd", products, v) + 17.0 * v
    wanted = m.out((above / below.transpose(1, 2)[..., None]).flatten(2))
    torch.testing.assert_close(m(inputs(), SEQ), wanted, rtol=0, atol=1e-10)
    exact = mixer()
    assert float((exact(inputs(), SEQ) - m(inputs(), SEQ)).detach().abs().max()) > 0.1
    later = SeqInfo.from_lengths([[30, 40], [70]], T)
    alone = m(inputs()[:1, 30:], SeqInfo.contiguous(1, 40))
    torch.testing.assert_close(m(inputs(), later)[:1, 30:], alone, rtol=0, atol=1e-10)


def test_a_large_beta_or_equal_codes_give_the_mean_of_the_values() -> None:
    x = inputs()
    means = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    large, equal = mixer(beta=1e9), mixer()
    with torch.no_grad():
        equal.qk.weight.zero_()
    for m, tolerance in ((large, 1e-6), (equal, 1e-10)):
        wanted = m.out(m.v(x).cumsum(1) / means)
        torch.testing.assert_close(m(x, SEQ), wanted, rtol=0, atol=tolerance)


def test_order_of_earlier_tokens_does_not_matter() -> None:
    m = mixer()
    x = inputs()
    moved = torch.cat([x[:, torch.randperm(T - 1, generator=torch.Generator().manual_seed(1))], x[:, -1:]], 1)
    torch.testing.assert_close(m(moved, SEQ)[:, -1], m(x, SEQ)[:, -1], rtol=0, atol=1e-10)


def test_straight_through_gradient() -> None:
    z = torch.tensor([-3.0, -1.1, -0.9, 0.0, 0.5, 1.2], requires_grad=True)
    (grad,) = torch.autograd.grad((sign_codes(z) * torch.arange(6)).sum(), z)
    assert grad.tolist() == [0.0, 0.0, 2.0, 3.0, 4.0, 0.0]
    m = mixer()
    m(inputs(), SEQ).square().sum().backward()
    assert float(m.qk.weight.grad.abs().sum()) > 0


def test_hash_functions_never_get_worse_and_agree_with_similarity() -> None:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 1, 6, H, 8, generator=rng, dtype=torch.float64)
    u = (centres + 0.4 * torch.randn(2, 8, 6, H, 8, generator=rng, dtype=torch.float64)).flatten(1, 2)
    u = normalised(u)
    targets = similarity_targets(u, 6)
    assert set(targets.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert bool((targets == 1).sum(-1).eq(6).all()) and bool((targets == -1).sum(-1).eq(6).all())
    features = torch.exp(-torch.cdist(u.transpose(1, 2), u[:1, :12].transpose(1, 2)).square() / 4).transpose(1, 2)
    features = features - features.mean((0, 1))

    def disagreement(lr: float) -> Tensor:
        """||b S0 - sum y y^T||^2 on the pairs that the targets speak of, as the greedy fit leaves it."""
        fit = fit_hash_functions(features, targets, 8, lr=lr, generator=torch.Generator().manual_seed(1))
        assert bool((fit.kept <= fit.first).all()) and bool((fit.kept < fit.first).any())
        codes = sign_codes(torch.einsum("bnhm,hrm->bnhr", features, fit.functions))
        products = torch.einsum("bnhr,bmhr->bhnm", codes, codes)
        return (8 * targets - products)[targets != 0].square().mean()

    random = sign_codes(torch.einsum("bnhm,hrm->bnhr", features, torch.randn(H, 8, 12, generator=rng).double()))
    before = (8 * targets - torch.einsum("bnhr,bmhr->bhnm", random, random))[targets != 0].square().mean()
    assert disagreement(5e-2) < before


def test_fitting_sets_buffers_that_a_checkpoint_keeps() -> None:
    m, other = mixer(), mixer(calibration_steps=50)
    x = inputs(3)
    m.fit_hashing(x, iterations=3)
    u = normalised(m.qk(x).unflatten(-1, (H, -1)))
    assert all(bool((u[0, :, h, None] - m.anchors[h]).norm(dim=-1).min(0).values.max() < 1e-12) for h in range(H))
    distances = (u[..., None, :] - m.anchors).square().sum(-1)
    torch.testing.assert_close(m.sigma, distances.mean((0, 1, 3)).detach())
    features = torch.exp(-distances / (2 * m.sigma[:, None]))
    torch.testing.assert_close(m.mean + CENTRE, features.mean((0, 1)).detach())
    assert {"anchors", "functions", "mean", "sigma", "fitted"} < set(m.state_dict()) and "sums" not in m.state_dict()
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(inputs(), SEQ), m(inputs(), SEQ)) and float(other.fitted) == 1.0
    before_step(other, Progress(0, 100, 0))
    assert not other.collects, "what is fitted is not calibrated again"
    with pytest.raises(UserError, match="too few for 25 anchors"):
        m.fit_hashing(inputs(length=20))


def test_calibration_follows_the_batches_then_stands_still() -> None:
    m = mixer(calibration_steps=80).train()
    for step in range(100):
        before_step(m, Progress(step, 1000, 0))
        m(inputs(step % 5), SEQ)
        after_step(m)
        if step == 79:
            frozen = m.mean.clone(), m.sigma.clone()
    assert torch.equal(m.mean, frozen[0]) and torch.equal(m.sigma, frozen[1])
    u = normalised(torch.cat([m.qk(inputs(seed)) for seed in range(5)]).unflatten(-1, (H, -1)))
    distances = (u[..., None, :] - m.anchors).square().sum(-1)
    torch.testing.assert_close(m.sigma, distances.mean((0, 1, 3)).detach(), rtol=0.02, atol=0)
    features = torch.exp(-distances / (2 * m.sigma[:, None]))
    torch.testing.assert_close(m.mean + CENTRE, features.mean((0, 1)).detach(), rtol=0.02, atol=0)


def test_calibration_is_the_same_over_ranks() -> None:
    whole, *ranks = (mixer().train() for _ in range(3))
    for m in (whole, *ranks):
        m.load_state_dict(whole.state_dict())
        before_step(m, Progress(0, 10, 0))
    whole(inputs(), SEQ)
    for m, x in zip(ranks, inputs().chunk(2)):
        m(x, SeqInfo.contiguous(1, T))
    total = torch.stack([torch.cat([m.sums.flatten(), m.count]) for m in ranks]).sum(0)
    after_step(whole)
    for m in ranks:
        after_step(m, lambda _: total.clone())
        torch.testing.assert_close(m.mean, whole.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(m.sigma, whole.sigma, rtol=0, atol=1e-12)


def test_a_beta_that_allows_negative_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="beta 3 is less than n_bits 16"):
        EcoFormerConfig(n_heads=2, beta=3.0)
