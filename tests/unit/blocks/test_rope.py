"""Rotary embeddings against transformers' for the same parameters, and their invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.blocks.rope import RopeConfig, RopeScaling, rope_rates
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context

D_HEAD, LONGEST = 32, 256
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 64},
    "yarn_options": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_seq_len": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 0.9,
        "truncate": False,
    },
    "llama3": {
        "type": "llama3",
        "factor": 8.0,
        "original_max_seq_len": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def as_theirs(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The same in transformers' names."""
    names = {"type": "rope_type", "original_max_seq_len": "original_max_position_embeddings"}
    return {names.get(key, key): value for key, value in (scaling or {"type": "default"}).items()}


def hf_rotary(theirs: dict[str, Any], theta: float, fraction: float = 1.0) -> Any:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**theirs, "rope_theta": theta} | ({"partial_rotary_factor": fraction} if fraction != 1.0 else {})
    config = LlamaConfig(
        hidden_size=2 * D_HEAD,
        num_attention_heads=2,
        head_dim=D_HEAD,
        max_position_embeddings=LONGEST,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", SCALINGS)
def test_equals_transformers(kind: str, theta: float) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ours = SCALINGS[kind]
    rope = RopeConfig(theta=theta, scaling=None if ours is None else RopeScaling(**ours)).build(
        context(max_seq_len=LONGEST)
    )
    rope.for_heads(D_HEAD)
    rotary = hf_rotary(as_theirs(ours), theta)
    rates, factor = rope_rates(rope.config, D_HEAD, LONGEST)
    torch.testing.assert_close(rates, rotary.inv_freq, rtol=0, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling, abs=0)
    seq = SeqInfo.contiguous(2, 40, start=torch.tensor([0, 200]))
    q, k = torch.randn(2, 40, 4, D_HEAD), torch.randn(2, 40, 2, D_HEAD)
    wanted = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary(q, seq.positions))
    for found, other in zip(rope.at_qk(q, k, seq), wanted):
        torch.testing.assert_close(found, other.transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_dynamic_ntk_equals_transformers_at_full_length() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = hf_rotary({"rope_type": "dynamic", "factor": 2.0}, 10000.0)
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](rotary.config, seq_len=4 * LONGEST)
    config = RopeConfig(scaling=RopeScaling(type="dynamic_ntk", factor=2.0, original_max_seq_len=LONGEST))
    torch.testing.assert_close(rope_rates(config, D_HEAD, 4 * LONGEST)[0], wanted, rtol=1e-6, atol=0)
    plain = rope_rates(RopeConfig(), D_HEAD, LONGEST)[0]
    torch.testing.assert_close(rope_rates(config, D_HEAD, LONGEST)[0], plain)


def test_ntk_keeps_the_fastest_and_divides_the_slowest() -> None:
    plain = rope_rates(RopeConfig(), D_HEAD, LONGEST)[0]
    stretched = rope_rates(RopeConfig(scaling=RopeScaling(type="ntk", factor=4.0)), D_HEAD, LONGEST)[0]
    torch.testing.assert_close(stretched[0], plain[0])
    torch.testing.assert_close(stretched[-1], plain[-1] / 4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scores_depend_on_distance_alone(interleaved: bool, fraction: float) -> None:
    rope = RopeConfig(interleaved=interleaved, fraction=fraction).build(context())
    rope.for_heads(16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        a, _ = rope.at_qk(q, k, SeqInfo.contiguous(1, 1, start=i))
        _, b = rope.at_qk(q, k, SeqInfo.contiguous(1, 1, start=j))
        return (a * b).sum()

    torch.testing.assert_close(score(5, 2), score(905, 902), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(score(5, 2), score(5, 3))
    torch.testing.assert_close(score(7, 7), (q * k).sum())


def test_interleaved_is_a_permutation_of_half_split() -> None:
    order = torch.arange(16).view(2, 8).t().flatten()
    halves, pairs = (RopeConfig(interleaved=flag).build(context()) for flag in (False, True))
    halves.for_heads(16), pairs.for_heads(16)
    q, k = torch.randn(2, 1, 9, 2, 16)
    seq = SeqInfo.contiguous(1, 9)
    for a, b in zip(halves.at_qk(q, k, seq), pairs.at_qk(q[..., order], k[..., order], seq)):
        torch.testing.assert_close(a[..., order], b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved: bool) -> None:
    rope = RopeConfig(interleaved=interleaved, fraction=0.5).build(context())
    rope.for_heads(8)
    seq = SeqInfo.contiguous(1, 3)
    q, k = torch.randn(2, 1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rope.at_qk(a, b, seq), (q, k))


def test_partial_leaves_the_rest() -> None:
    rope = RopeConfig(fraction=0.25).build(context())
    rope.for_heads(16)
    q, k = torch.randn(2, 1, 5, 1, 16)
    found, _ = rope.at_qk(q, k, SeqInfo.contiguous(1, 5))
    assert torch.equal(found[..., 4:], q[..., 4:]) and not torch.equal(found[:, 1:, :, :4], q[:, 1:, :, :4])


def test_tables_are_shared_by_equal_configs_only() -> None:
    seq = SeqInfo.contiguous(1, 4)
    for config in (RopeConfig(), RopeConfig(), RopeConfig(theta=500.0)):
        rope = config.build(context())
        rope.for_heads(8)
        rope.prepare(seq, torch.float32)
    assert len(seq.derived) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeConfig(fraction=0.3).build(context()).for_heads(10), "even number"),
        (lambda: RopeScaling(type="yarn", factor=2.0), "original_max_seq_len"),
        (lambda: RopeScaling(type="linear", factor=2.0, beta_fast=3.0), "does not use beta_fast"),
        (
            lambda: RopeScaling(type="llama3", factor=2.0, original_max_seq_len=8, low_freq_factor=4.0),
            "above low_freq_factor",
        ),
        (lambda: RopeConfig(scaling=RopeScaling(type="ntk", factor=2.0)).build(context()).for_heads(2), "ntk"),
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        make()
