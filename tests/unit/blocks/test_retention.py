"""Retention against its parallel form with the official scalings, its rotation, decays, start values and sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.mixers.retention import Retention, RetentionConfig, theta_shift
from llm.blocks.norms import LayerNormConfig, RMSNormConfig
from llm.blocks.rope import rope_rates
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.core.state import RecurrentState
from tests.unit.blocks.helpers import context, ready

B, T, D = 2, 45, 32


def build(dtype: torch.dtype = torch.float64, **fields: Any) -> Retention:
    return ready(RetentionConfig(**({"n_heads": 4} | fields)).build(context(D)), dtype)


def sample(length: int = T, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def rotated(x: Tensor, start: int = 0) -> Tensor:
    """Theta shift from its definition, x [B, T, H, K]."""
    half = x.shape[-1] // 2
    rates = rope_rates(theta_shift(2 * half), 2 * half, 64)[0].to(x.dtype)  # fp32, as in the module
    torch.testing.assert_close(rates, 1.0 / 10000.0 ** torch.linspace(0, 1, half, dtype=x.dtype), rtol=1e-5, atol=0)
    angle = (start + torch.arange(x.shape[1], dtype=x.dtype))[:, None] * rates.repeat_interleave(2)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * angle.cos()[:, None] + turned * angle.sin()[:, None]


def parallel(module: Retention, x: Tensor, *, official: bool = False, gammas: Tensor | None = None) -> Tensor:
    """((Q K^T) . D) V; the official code also divides the rows of D by the square root of their sums, and scores by
    the sum of their magnitudes where that exceeds 1."""
    q, k, v = (f(x).unflatten(-1, (module.n_heads, -1)) for f in (module.q, module.k, module.v))
    if module.position is not None:
        q, k = rotated(q), rotated(k)
    k = k * module.d_key**-0.5
    if gammas is None:
        gammas = 1 - 2.0 ** (-5 - torch.arange(module.n_heads, dtype=x.dtype))
    distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).to(x.dtype)
    decay = torch.where(distance >= 0, gammas[:, None, None] ** distance.clamp(min=0), 0.0)
    if official:
        decay = decay / decay.sum(-1, keepdim=True).sqrt()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * decay
    if official:
        scores = scores / scores.abs().sum(-1, keepdim=True).clamp(min=1.0, max=5e4)
    o = torch.einsum("bhts,bshv->bthv", scores, v)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + module.head_norm.eps)  # type: ignore[operator]
    return module.out(F.silu(module.gate(x)) * o.flatten(2))


@pytest.mark.parametrize("chunk", [1, 7, 15, 45, 64])
def test_chunks_equal_the_parallel_form(chunk: int) -> None:
    module, x = build(chunk=chunk), sample()
    torch.testing.assert_close(module(x, SeqInfo.contiguous(B, T)), parallel(module, x), atol=1e-12, rtol=1e-12)


def test_chunks_equal_the_parallel_form_in_fp32() -> None:
    module = build(torch.float32, chunk=16)
    found = module(sample(dtype=torch.float32), SeqInfo.contiguous(B, T))
    wanted = parallel(module.double(), sample())
    assert (found - wanted).abs().max() < 5e-6 * wanted.abs().max()


def test_official_scalings_vanish_behind_the_head_norm() -> None:
    """To rounding without the norm's eps, and nearly with it."""
    x = sample()
    for eps, tolerance in ((1e-200, 1e-12), (1e-6, 1e-3)):
        module = build(head_norm=RMSNormConfig(eps=eps, affine=False))
        wanted = parallel(module, x, official=True)
        gap = (module(x, SeqInfo.contiguous(B, T)) - wanted).abs().max()
        assert gap < tolerance * wanted.abs().max(), eps


@pytest.mark.parametrize("config", [{}, {"d_key": 6, "d_value": 5, "decay": "log_linear", "rotation": "none"}])
def test_prefill_by_chunks_then_steps_equals_forward(config: dict[str, Any]) -> None:
    module, x = build(chunk=8, **config), sample()
    whole = module(x, SeqInfo.contiguous(B, T))
    state = module.new_state(B, T, dtype=torch.float64, device="cpu")
    parts, start = [], 0
    for length in (30, *[1] * 6, 9):
        call = module.step if length == 1 else module.prefill
        parts.append(call(x[:, start : start + length], SeqInfo.contiguous(B, length, start=start), state))
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_limits_of_the_decay(gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """1: causal linear attention without normaliser; 0: each position sees itself alone."""
    module, x = build(chunk=8, rotation="none"), sample()
    gammas = torch.full((4,), gamma, dtype=torch.float64)
    monkeypatch.setattr(module, "log_decays", lambda device: gammas.log())
    q, k, v = (f(x).unflatten(-1, (4, -1)) for f in (module.q, module.k, module.v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * module.d_key**-0.5
    scores = scores.tril() if gamma else scores * torch.eye(T)
    o = module.head_norm(torch.einsum("bhts,bshv->bthv", scores, v)).flatten(2)
    wanted = module.out(F.silu(module.gate(x)) * o)
    torch.testing.assert_close(module(x, SeqInfo.contiguous(B, T)), wanted, atol=1e-10, rtol=1e-10)


def test_outputs_depend_on_distances_alone() -> None:
    module, x = build(), sample()
    here, shifted = (module(x, SeqInfo.contiguous(B, T, start=start)) for start in (0, 1000))
    torch.testing.assert_close(here, shifted, atol=1e-9, rtol=1e-9)


def test_tokens_without_keys_and_values_before_it_change_nothing() -> None:
    module, x = build(rotation="theta_shift"), sample()
    silent = torch.zeros(B, 11, D, dtype=torch.float64)  # projections have no bias: k = v = 0
    padded = module(torch.cat([silent, x], dim=1), SeqInfo.contiguous(B, T + 11))
    torch.testing.assert_close(padded[:, 11:], module(x, SeqInfo.contiguous(B, T)), atol=1e-10, rtol=1e-10)


def test_decays() -> None:
    powers = build().log_decays(torch.device("cpu")).exp()
    torch.testing.assert_close(powers, 1 - 2.0 ** -torch.arange(5.0, 9.0).double())
    even = build(decay="log_linear").log_decays(torch.device("cpu")).exp()
    torch.testing.assert_close(even[[0, -1]], torch.tensor([1 - 1 / 32, 1 - 1 / 512]).double())
    assert bool((even.diff() > 0).all())


def test_theta_shift_rates() -> None:
    """The first pair turns by 1 radian per token, the last by 1e-4."""
    for width in (4, 16, 256):
        rates, _ = rope_rates(theta_shift(width), width, 64)
        torch.testing.assert_close(rates, 1.0 / 10000.0 ** torch.linspace(0, 1, width // 2), rtol=1e-4, atol=0)


def test_group_norm_is_a_layer_norm_per_head() -> None:
    module = build(head_norm=LayerNormConfig(affine=False, bias=False, eps=1e-5))
    o = torch.randn(B, 3, 4, module.d_value, dtype=torch.float64)
    wanted = F.group_norm(o.reshape(B * 3, -1), 4, eps=1e-5).view_as(o)
    torch.testing.assert_close(module.head_norm(o), wanted)


def test_xavier_start() -> None:
    module = RetentionConfig(n_heads=4, xavier_init=True).build(context(256))
    initialise(module, 0)
    for name, gain in (("q", 2**-2.5), ("k", 2**-2.5), ("v", 2**-2.5), ("gate", 2**-2.5), ("out", 0.5)):
        weight = getattr(module, name).weight
        bound = gain * math.sqrt(6 / sum(weight.shape))
        assert 0.99 * bound < float(weight.detach().abs().max()) <= bound, name
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02), name


def test_decays_survive_bf16() -> None:
    module = build(torch.bfloat16, n_heads=8)
    decay = module.log_decays(torch.device("cpu")).exp()[-1]
    assert float(decay) == 1 - 2.0**-12, "1 - 2^-12 is 1 in bf16"


def test_state_is_fp32_whatever_the_model() -> None:
    state = build(torch.bfloat16).new_state(1, 8, n_tentative=4, dtype=torch.bfloat16, device="cpu")
    assert isinstance(state, RecurrentState)
    assert state.committed["s"].dtype == torch.float32
    assert state.policy == "replay" and state.factors["k"].shape[1] == 4


def test_mistakes() -> None:
    with pytest.raises(UserError, match="d_model 32 is not divisible by n_heads 3"):
        RetentionConfig(n_heads=3).build(context(D))
    with pytest.raises(UserError, match="d_key 5 must be even"):
        RetentionConfig(n_heads=2, d_key=5).build(context(D))
