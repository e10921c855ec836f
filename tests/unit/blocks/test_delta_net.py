"""DeltaNet and Gated DeltaNet against token loops from the definition and against transformers; starts, recall."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.mixers.delta_net import DeltaNet, DeltaNetConfig, GatedDeltaNetConfig
from llm.blocks.time_step import TimeStep
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, RecurrentState
from tests.unit.blocks.helpers import context, ready

B, T, D = 2, 45, 32
CONFIGS: dict[str, Any] = {
    "delta": DeltaNetConfig(n_heads=4, chunk=16),
    "delta_all": DeltaNetConfig(
        n_heads=2, n_value_heads=4, d_key=6, d_value=5, gate=True, negative_eigenvalues=True, conv_width=3, chunk=7
    ),
    "delta_bare": DeltaNetConfig(n_heads=4, conv_width=None, chunk=100),
    "gated": GatedDeltaNetConfig(n_heads=4, chunk=16),
    "gated_all": GatedDeltaNetConfig(
        n_heads=2, n_value_heads=4, d_key=6, d_value=5, gate=False, negative_eigenvalues=True, chunk=1
    ),
}


def build(config: Any, dtype: torch.dtype = torch.float64) -> DeltaNet:
    return ready(config.build(context(D)), dtype)


def sample(length: int = T, d_model: int = D) -> Tensor:
    return torch.randn(B, length, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_tokens(module: DeltaNet, config: Any, x: Tensor) -> Tensor:
    """The mixer from its definition, without chunks, joined products or our convolution."""
    qkv = [getattr(module, name)(x) for name in "qkv"]
    if module.conv is not None:
        weights = module.conv.weight.split([part.shape[-1] for part in qkv])
        past = module.conv.width - 1
        qkv = [
            F.conv1d(F.pad(part.transpose(1, 2), (past, 0)), weight, groups=weight.shape[0]).transpose(1, 2)
            for part, weight in zip(qkv, weights)
        ]
    q, k, v = (F.silu(part) for part in qkv)
    q, k = (part.unflatten(-1, (config.n_heads, -1)) for part in (q, k))
    heads = module.n_value_heads
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    q, k = (part.repeat_interleave(heads // config.n_heads, dim=2) for part in (q, k))
    v = v.unflatten(-1, (heads, -1))
    beta = torch.sigmoid(module.beta(x)) * (2 if config.negative_eigenvalues else 1)  # type: ignore[operator]
    decay = torch.ones_like(beta)
    if module.time_step is not None:
        dt = F.softplus(module.decay(x) + module.time_step.dt_bias)  # type: ignore[operator]
        decay = torch.exp(-module.time_step.a_log.exp() * dt)
    s = x.new_zeros(B, heads, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        s = s * decay[:, t, :, None, None]
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], s)
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) * module.d_key**-0.5)
    y = torch.stack(outputs, dim=1)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * module.head_norm.weight
    y = y.flatten(2)
    return module.out(y * F.silu(module.gate(x)) if config.gate else y)  # type: ignore[operator]


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_definition(name: str) -> None:
    config, x = CONFIGS[name], sample()
    module = build(config)
    torch.testing.assert_close(
        module(x, SeqInfo.contiguous(B, T)), by_tokens(module, config, x), atol=1e-10, rtol=1e-10
    )


def test_equals_transformers_with_the_same_weights() -> None:
    """Qwen3-Next's layer: two value heads per key head, output gate, decay."""
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers import Qwen3NextConfig

    groups, heads, d_key, d_value = 2, 4, 8, 6
    hf = Qwen3NextConfig(
        hidden_size=D,
        linear_num_key_heads=groups,
        linear_num_value_heads=heads,
        linear_key_head_dim=d_key,
        linear_value_head_dim=d_value,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    layer = theirs.Qwen3NextGatedDeltaNet(hf, 0).eval()
    ours = build(
        GatedDeltaNetConfig(n_heads=groups, n_value_heads=heads, d_key=d_key, d_value=d_value, chunk=16), torch.float32
    )
    assert ours.conv is not None and ours.time_step is not None
    repeats = heads // groups
    with torch.no_grad():
        qkvz = layer.in_proj_qkvz.weight.unflatten(0, (groups, -1))
        parts = qkvz.split([d_key, d_key, repeats * d_value, repeats * d_value], dim=1)
        for name, part in zip(("q", "k", "v", "gate"), parts):
            getattr(ours, name).weight.copy_(part.flatten(0, 1))
        ba = layer.in_proj_ba.weight.unflatten(0, (groups, -1))
        for name, part in zip(("beta", "decay"), ba.split([repeats, repeats], dim=1)):
            getattr(ours, name).weight.copy_(part.flatten(0, 1))
        ours.conv.weight.copy_(layer.conv1d.weight)
        layer.dt_bias.copy_(torch.randn(heads))
        layer.norm.weight.copy_(1 + 0.1 * torch.randn(d_value))
        ours.time_step.dt_bias.copy_(layer.dt_bias)
        ours.time_step.a_log.copy_(layer.A_log)
        ours.head_norm.weight.copy_(layer.norm.weight)
        ours.out.weight.copy_(layer.out_proj.weight)
        x = 3 * sample(150).float()
        seq = SeqInfo.contiguous(B, 150)
        found, wanted = ours(x, seq), layer(x)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in layer.parameters())
    assert wanted.abs().max() > 1
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_without_decay_the_gated_one_is_delta_net() -> None:
    gated = build(GatedDeltaNetConfig(n_heads=4, d_value=8, chunk=16))
    plain = build(DeltaNetConfig(n_heads=4, gate=True, chunk=16))
    plain.load_state_dict(gated.state_dict(), strict=False)
    assert gated.time_step is not None
    with torch.no_grad():
        gated.time_step.a_log.fill_(-1e3)  # a rate of zero
        x = sample()
        seq = SeqInfo.contiguous(B, T)
        torch.testing.assert_close(gated(x, seq), plain(x, seq), atol=1e-12, rtol=1e-12)


def test_a_forgotten_past_changes_nothing() -> None:
    """Where the decay at token t shuts, outputs from t on do not depend on what the state held before."""
    module = build(GatedDeltaNetConfig(n_heads=2, conv_width=None, chunk=8))
    assert module.time_step is not None
    with torch.no_grad():
        module.time_step.a_log.fill_(8.0)
        module.time_step.dt_bias.fill_(3.0)
        x = sample(20)
        other = x.clone()
        other[:, :9] = sample(9).flip(0)
        seq = SeqInfo.contiguous(B, 20)
        torch.testing.assert_close(module(x, seq)[:, 10:], module(other, seq)[:, 10:], atol=1e-10, rtol=1e-10)


def test_start_values() -> None:
    step = TimeStep(4096, (0.001, 0.1), (1.0, 16.0))
    initialise(step, 0)
    dt, rate = F.softplus(step.dt_bias.detach()), step.a_log.detach().exp()
    assert 0.00099 < float(dt.min()) < 0.0011 and 0.09 < float(dt.max()) < 0.101
    assert float(dt.log().mean()) == pytest.approx(-4.605, abs=0.1), "log-uniform: the median is 0.01"
    assert 0.99 < float(rate.min()) < 1.1 and 15.9 < float(rate.max()) <= 16.0
    assert float(rate.mean()) == pytest.approx(8.5, abs=0.3)
    from_zero = TimeStep(4096, (0.0, 0.1), (0.0, 16.0))
    initialise(from_zero, 0)


def test_the_decay_is_computed_in_fp32() -> None:
    step = ready(TimeStep(4, (0.001, 0.1), (1.0, 16.0)), torch.bfloat16)
    dt, log_decay = step(torch.zeros(1, 3, 4, dtype=torch.bfloat16))
    assert dt.dtype == log_decay.dtype == torch.float32
    assert bool((log_decay < 0).all())


@pytest.mark.parametrize(("n_tentative", "policy"), [(1, "copies"), (4, "replay")])
def test_the_state_takes_the_smaller_policy(n_tentative: int, policy: str) -> None:
    module = build(CONFIGS["gated"])
    state = module.new_state(1, 8, n_tentative=n_tentative, dtype=torch.bfloat16, device="cpu")
    assert isinstance(state, CompositeState)
    memory = state["memory"]
    assert isinstance(memory, RecurrentState)
    assert memory.policy == policy
    assert memory.committed["s"].dtype == torch.float32


def test_recall_of_as_many_pairs_as_the_keys_are_wide() -> None:
    """8 orthogonal keys of width 8 hold 8 values exactly, also after each was overwritten once; addition mixes them."""
    from kernels.delta_rule import delta_rule
    from kernels.linear_attention import linear_attention

    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][None, :, None]
    k = keys.repeat(1, 3, 1, 1)
    v = torch.randn(1, 24, 1, 4, dtype=torch.float64)
    v[:, 16:] = 0  # the last pass only asks
    beta = torch.ones(1, 24, 1, dtype=torch.float64)
    beta[:, 16:] = 0
    recalled, _ = delta_rule(k, k, v, beta, chunk=5)
    torch.testing.assert_close(recalled[:, 16:], v[:, 8:16])
    added, _ = linear_attention(k, k, v)
    torch.testing.assert_close(added[:, 16:], v[:, :8] + v[:, 8:16])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="n_value_heads 3 must be a multiple of n_heads 2"):
        GatedDeltaNetConfig(n_heads=2, n_value_heads=3)
    with pytest.raises(UserError, match="delta_net: d_model 32 is not divisible by n_heads 3"):
        DeltaNetConfig(n_heads=3).build(context(D))
    with pytest.raises(ValueError, match="0 <= low <= high"):
        GatedDeltaNetConfig(n_heads=2, dt_range=(0.1, 0.01))
