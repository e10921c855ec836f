"""Complex-vector attention: the separable form against the double sum, and the special cases in which it is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.blocks.mixers.attention import Attention, AttentionConfig
from llm.blocks.mixers.complexformer import ComplexFormer, ComplexFormerConfig, Pairing, _MapPhase
from llm.blocks.norms import RMSNormConfig
from llm.blocks.positions import AlibiConfig, NoPositionConfig
from llm.blocks.rope import RopeConfig
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.parallel.plan import plan_of
from tests.unit.blocks.helpers import context, ready

D = 32


def build(*, seed: int = 0, position: Any = None, **fields: Any) -> ComplexFormer:
    """A mixer in float64 whose slopes and offsets are away from their start."""
    ctx = context(D, position_config=position or RopeConfig())
    mixer = ready(ComplexFormerConfig.model_validate({"n_heads": 4} | fields).build(ctx), seed=seed)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(seed)
        for parameter in mixer.phase.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64), alpha=0.5)
    return mixer


def adapt_nothing(mixer: ComplexFormer) -> ComplexFormer:
    with torch.no_grad():
        mixer.phase.slope.fill_(1.0)
        mixer.phase.offset.fill_(0.0)
    return mixer


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(mixer: ComplexFormer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Complex q and k [B, T, H, r], and v [B, T, H, Dh]; keys and values repeated over their groups."""
    groups = mixer.n_heads // mixer.n_kv_heads
    q, k, v = (part(x).unflatten(-1, (-1, mixer.d_head)) for part in (mixer.q, mixer.k, mixer.v))
    pairing = mixer.phase.pairing
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    return torch.complex(*pairing.split(q)), torch.complex(*pairing.split(k)), v


def naive_scores(mixer: ComplexFormer, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """[B, H, T, S]: the sum over pairs of |q| |k| cos(slope (phase difference) + offset + (m - n) g), unscaled."""
    n_pairs = q.shape[-1]
    slope, offset = mixer.phase.slope, mixer.phase.offset
    if slope.numel() > 1:
        slope = slope.view(-1, n_pairs).repeat_interleave(mixer.n_heads // mixer.n_kv_heads, 0)
        offset = offset.view(-1, n_pairs)
    rates = 10000.0 ** (-torch.arange(n_pairs, dtype=torch.float32) / n_pairs)  # the angles of RoPE start in fp32
    between = q.angle()[:, :, None] - k.angle()[:, None]
    distance = (q_positions[:, None] - k_positions).double()[None, :, :, None, None]
    angle = slope * between + offset + distance * rates.double()
    return (q.abs()[:, :, None] * k.abs()[:, None] * angle.cos()).sum(-1).permute(0, 3, 1, 2)


def naive(mixer: ComplexFormer, x: Tensor) -> Tensor:
    """The mixer's outputs through the double sum."""
    q, k, v = heads(mixer, x)
    positions = torch.arange(x.shape[1])
    scores = naive_scores(mixer, q, k, positions, positions) * mixer.form.scale
    future = positions[None, :] > positions[:, None]
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return mixer.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))


@pytest.mark.parametrize(
    "fields", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "adapt": "layer"}, {"bias": True, "scale": 1.0}], ids=str
)
def test_separable_equals_the_double_sum(fields: dict[str, Any]) -> None:
    mixer = build(**fields)
    x = randn(2, 13, D)
    with torch.no_grad():
        wanted = naive(mixer, x)
        torch.testing.assert_close(mixer(x, SeqInfo.contiguous(2, 13)), wanted, rtol=1e-12, atol=1e-12)
        state = mixer.new_state(2, 13, dtype=torch.float64, device="cpu")
        parts = [
            mixer.prefill(x[:, a:b], SeqInfo.contiguous(2, b - a, start=a), state) for a, b in ((0, 6), (6, 7), (7, 13))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "position",
    [RopeConfig(), RopeConfig(interleaved=True), RopeConfig(fraction=0.5), AlibiConfig(), NoPositionConfig()],
    ids=lambda p: f"{p.type}-{getattr(p, 'interleaved', '')}-{getattr(p, 'fraction', '')}",
)
def test_slope_one_without_offset_is_attention(position: Any) -> None:
    """Exactly rotary attention, whichever channels are paired, with gradients, norms, windows and shared keys too."""
    fields: dict[str, Any] = {"n_kv_heads": 2, "window": 7, "n_sinks": 1, "qk_norm": RMSNormConfig()}
    mixer = adapt_nothing(build(position=position, **fields))
    plain = AttentionConfig(n_heads=4, **fields).build(context(D, position_config=position)).double()
    plain.load_state_dict({name: t for name, t in mixer.state_dict().items() if not name.startswith("phase.")})
    assert type(plain) is Attention
    x = randn(2, 13, D).requires_grad_()
    upstream = randn(2, 13, D, seed=2)
    outcomes = []
    for part in (mixer, plain):
        y = part(x, SeqInfo.contiguous(2, 13))
        outcomes.append((y, torch.autograd.grad(y, [x, part.q.weight], upstream)))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-14, atol=2e-15)


def scores(mixer: ComplexFormer, x: Tensor, y: Tensor, q_start: int, k_start: int) -> Tensor:
    """[B, H, T, S]: unscaled dot products of the mapped queries of x and keys of y, which start at these positions."""
    q, k = mixer.q(x).unflatten(-1, (-1, mixer.d_head)), mixer.k(y).unflatten(-1, (-1, mixer.d_head))
    q, k = mixer.before_positions(q, k)
    turned_q, _ = mixer.position.at_qk(q, k, SeqInfo.contiguous(*x.shape[:2], start=q_start))
    _, turned_k = mixer.position.at_qk(q, k, SeqInfo.contiguous(*y.shape[:2], start=k_start))
    turned_k = turned_k.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, 2)
    return torch.einsum("bthd,bshd->bhts", turned_q, turned_k)


def test_positions_matter_through_their_difference() -> None:
    mixer = build()
    x, y = randn(1, 5, D), randn(1, 5, D, seed=2)
    base = scores(mixer, x, y, 9, 2)
    for shift in (1, 100, 12345):
        torch.testing.assert_close(scores(mixer, x, y, 9 + shift, 2 + shift), base, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(scores(mixer, x, y, 10, 2), base, atol=1e-3)


def test_slope_zero_sees_magnitudes_alone() -> None:
    mixer = build()
    with torch.no_grad():
        mixer.phase.slope.zero_()
    q, k = randn(1, 4, 4, 8), randn(1, 4, 4, 8, seed=2)
    mapped = mixer.phase(q, k)
    turn = torch.polar(torch.ones(4, dtype=torch.float64), randn(4, seed=3))
    turned = []
    for part in (q, k):
        z = torch.complex(*mixer.phase.pairing.split(part)) * turn
        turned.append(mixer.phase.pairing.join(z.real, z.imag))
    for a, b in zip(mapped, mixer.phase(*turned)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    real, imaginary = mixer.phase.pairing.split(mapped[0])
    wanted = torch.hypot(*mixer.phase.pairing.split(q)) * mixer.phase.offset.view(4, 4).cos()
    torch.testing.assert_close(real, wanted)
    assert (imaginary != 0).any()


@pytest.mark.parametrize("distance", [1, 7])
def test_an_offset_is_a_shift_of_the_queries(distance: int) -> None:
    """offset = g t with slope 1 moves all queries by t."""
    mixer = adapt_nothing(build())
    x, y = randn(1, 5, D), randn(1, 5, D, seed=2)
    moved = scores(mixer, x, y, 3 + distance, 1)
    with torch.no_grad():
        rates = 10000.0 ** (-torch.arange(4, dtype=torch.float32) / 4)
        mixer.phase.offset.copy_((rates * distance).repeat(4))
    torch.testing.assert_close(scores(mixer, x, y, 3, 1), moved, rtol=1e-6, atol=1e-6)


def test_without_rates_it_is_the_dot_product() -> None:
    mixer = adapt_nothing(build(position=NoPositionConfig()))
    x, y = randn(1, 5, D), randn(1, 5, D, seed=2)
    q, k = (part(z).unflatten(-1, (4, 8)) for part, z in ((mixer.q, x), (mixer.k, y)))
    torch.testing.assert_close(scores(mixer, x, y, 3, 1), torch.einsum("bthd,bshd->bhts", q, k), rtol=1e-13, atol=1e-13)


def test_query_and_key_can_change_places_without_an_offset() -> None:
    """(a at m asks c at n) scores as (c at n asks a at m) for any slope, since the cosine is even."""
    mixer = build()
    with torch.no_grad():
        mixer.phase.offset.zero_()
        mixer.k.weight.copy_(mixer.q.weight)
    a, c = randn(1, 3, D), randn(1, 3, D, seed=2)
    torch.testing.assert_close(
        scores(mixer, a, c, 11, 4).transpose(2, 3), scores(mixer, c, a, 4, 11), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("slope", "jump"), [(0.7, 0.337), (1.0, 0.0), (2.0, 0.0)])
def test_the_branch_cut(slope: float, jump: float) -> None:
    """For a slope that is no whole number the score jumps when a phase crosses pi: a property of the method."""
    slopes, pairing = torch.tensor([slope], dtype=torch.float64), Pairing(2, False)

    def score(query_phase: float) -> float:
        q, k = (
            torch.tensor([math.cos(p), math.sin(p)], dtype=torch.float64).view(1, 1, 1, 2) for p in (query_phase, 0.3)
        )
        mapped = [_MapPhase.apply(part, slopes, None, pairing) for part in (q, k)]
        return float((mapped[0] * mapped[1]).sum())

    assert abs(score(math.pi - 1e-9) - score(-math.pi + 1e-9)) == pytest.approx(jump, abs=1e-3)


@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 2}, {"adapt": "layer"}])
def test_parameters_beyond_those_of_attention(fields: dict[str, Any]) -> None:
    """Exactly d_model more per layer with as many key-value heads as heads."""
    config = AttentionConfig(n_heads=4, n_kv_heads=fields.get("n_kv_heads"))
    plain = sum(p.numel() for p in config.build(context(D)).parameters())
    more = sum(p.numel() for p in build(**fields).parameters()) - plain
    assert more == {"n_kv_heads": 8 + 16, "adapt": 2}.get(next(iter(fields), ""), D)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_rounds_once(dtype: torch.dtype, tolerance: float) -> None:
    """The map itself runs in fp32, so its result is off by the rounding of the result alone."""
    mixer = build()
    x = randn(2, 64, 4, 8).to(dtype)
    slope, offset = mixer.phase.slope.view(4, 4), mixer.phase.offset.view(4, 4)
    exact = _MapPhase.apply(x.double(), slope, offset, mixer.phase.pairing)
    found = _MapPhase.apply(x, slope.float(), offset.float(), mixer.phase.pairing)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= tolerance * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_bounded_near_the_origin(dtype: torch.dtype) -> None:
    """No gradient grows where a pair vanishes; at the origin slope 1 has the gradient of the identity."""
    slope, offset, pairing = torch.tensor([0.6, 1.0]), torch.tensor([0.3, 0.0]), Pairing(4, False)
    for size in (0.0, 1e-38, 1e-20, 1e-3, 1e18):
        x = torch.full((1, 1, 1, 4), size).to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(_MapPhase.apply(x, slope, offset, pairing).sum(), x)
        assert grad.isfinite().all() and float(grad.abs().max()) < 3, size
        torch.testing.assert_close(grad[..., 1::2], torch.ones_like(grad[..., 1::2]), rtol=1e-2, atol=1e-2)


def test_a_training_step_compiles_to_the_same_gradients() -> None:
    mixer = build(n_kv_heads=2).float()
    x = randn(1, 9, D).float().requires_grad_()
    seq = SeqInfo.contiguous(1, 9)
    mixer.prepare(seq, x.dtype)
    wanted = torch.autograd.grad(mixer(x, seq).square().sum(), [x, *mixer.parameters()])
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    found = torch.autograd.grad(compiled(x, seq).square().sum(), [x, *mixer.parameters()])
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_phase_parameters_are_not_decayed_and_stay_fp32() -> None:
    mixer = build()
    assert {p.dim() for p in mixer.phase.parameters()} == {1}
    assert plan_of(ComplexFormerConfig(n_heads=4)).fp32_params == ("*.phase.*",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_head": 7}, "must be even, not 7|even number"),
        ({"slope_init": "zero", "max_deviation": 0.1}, "set slope_init: one or remove max_deviation"),
        ({"n_kv_heads": 3}, "not divisible by n_kv_heads 3"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(position=NoPositionConfig(), **fields)


def test_it_does_not_export_as_plain_attention() -> None:
    from llm.checkpoint.hf.shape import _uniform
    from llm.models.config import ModelConfig

    block = {"mixer": {"type": "complexformer", "n_heads": 4}, "channel": "swiglu"}
    config = ModelConfig.model_validate({"vocab_size": 16, "d_model": 32, "layers": [{"pattern": [block]}]})
    with pytest.raises(UserError, match="mixer is 'complexformer'"):
        _uniform(config)
