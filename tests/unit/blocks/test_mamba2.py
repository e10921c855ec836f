"""Mamba-2 against transformers with the same weights, against a token loop, and its start values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.mixers.mamba2 import Mamba2, Mamba2Config
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, RecurrentState
from llm.models.config import ModelConfig
from tests.unit.blocks.helpers import context, ready

B, T, D = 2, 45, 32
SMALL: dict[str, Any] = {"d_state": 12, "d_head": 16}


def build(dtype: torch.dtype = torch.float64, **fields: Any) -> Mamba2:
    return ready(Mamba2Config(**(SMALL | fields)).build(context(D)), dtype)


def sample(length: int = T) -> Tensor:
    return torch.randn(B, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def copy_weights(ours: Mamba2, theirs: Any) -> None:
    """Rows of the official input projection: gate, x, B, C, dt."""
    order = ("gate", "x", "b", "c", "dt")
    rows = [ours.widths[name] for name in order]
    for name, weight in zip(order, theirs.in_proj.weight.split(rows)):
        getattr(ours, name).weight.copy_(weight)
    if theirs.in_proj.bias is not None:
        for name, bias in zip(order, theirs.in_proj.bias.split(rows)):
            getattr(ours, name).bias.copy_(bias)
        ours.out.bias.copy_(theirs.out_proj.bias)  # type: ignore[union-attr, operator]
    ours.conv.weight.copy_(theirs.conv1d.weight)
    if ours.conv.bias is not None:
        ours.conv.bias.copy_(theirs.conv1d.bias)
    ours.time_step.dt_bias.copy_(theirs.dt_bias)
    ours.time_step.a_log.copy_(theirs.A_log)
    ours.skip.copy_(theirs.D)
    ours.norm.weight.copy_(theirs.norm.weight)
    ours.out.weight.copy_(theirs.out_proj.weight)  # type: ignore[union-attr, operator]


def hf_config(**fields: Any) -> Any:
    from transformers import Mamba2Config as Theirs

    return Theirs(hidden_size=D, num_heads=4, head_dim=16, state_size=12, vocab_size=50, num_hidden_layers=2, **fields)


@pytest.mark.parametrize(
    "fields", [{"n_groups": 1}, {"n_groups": 2, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3}]
)
def test_equals_transformers_with_the_same_weights(fields: dict[str, Any]) -> None:
    theirs = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    torch.manual_seed(0)
    layer = theirs.Mamba2Mixer(hf_config(chunk_size=32, **fields), 0).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name not in ("A_log", "dt_bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours = build(
        torch.float32,
        n_groups=fields["n_groups"],
        bias=fields.get("use_bias", False),
        conv_bias=fields.get("use_conv_bias", True),
        conv_width=fields.get("conv_kernel", 4),
        chunk=16,
    )
    copy_weights(ours, layer)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in layer.parameters())
    with torch.no_grad():
        x = sample(150).float()
        found, wanted = ours(x, SeqInfo.contiguous(B, 150)), layer(x)
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_model_has_the_logits_of_transformers() -> None:
    """Whole models of mixers alone: all logits, and greedy tokens while decoding with both libraries' states."""
    transformers = pytest.importorskip("transformers")
    hf = hf_config(n_groups=1, tie_word_embeddings=True, layer_norm_epsilon=1e-5, residual_in_fp32=True)
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(hf).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = ModelConfig.model_validate(
        {
            "vocab_size": 50,
            "d_model": D,
            "max_seq_len": 64,
            "layers": [{"pattern": [{"mixer": {"type": "mamba2", **SMALL}}], "repeat": 2}],
            "position": {"type": "none"},
            "norm": {"type": "rms_norm", "eps": 1e-5},
        }
    )
    ours: Any = config.build("cpu")
    initialise(ours, 0)
    with torch.no_grad():
        ours.embed.weight.copy_(theirs.backbone.embeddings.weight)
        ours.final_norm.weight.copy_(theirs.backbone.norm_f.weight)
        for block, layer in zip(ours.layers, theirs.backbone.layers):
            block.residual.mixer_norm.weight.copy_(layer.norm.weight)
            copy_weights(block.mixer, layer.mixer)
        tokens = torch.randint(0, 50, (B, 33))
        wanted = theirs(tokens).logits
        found = ours.head(ours(tokens, SeqInfo.contiguous(B, 33)).hidden)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
        greedy = theirs.generate(tokens[:, :9], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        state = ours.new_state(B, 32, dtype=torch.float32, device="cpu")
        chunk, picked = tokens[:, :9], [tokens[:, :9]]
        for _ in range(12):
            seq = SeqInfo.contiguous(B, chunk.shape[1], start=state.end())
            chunk = ours.head(ours(chunk, seq, state=state).hidden[:, -1:]).argmax(-1)
            picked.append(chunk)
    assert torch.equal(torch.cat(picked, dim=1), greedy)


@pytest.mark.parametrize("fields", [{}, {"n_groups": 2, "chunk": 7}, {"chunk": 1, "bias": True}])
def test_equals_the_state_space_model_token_by_token(fields: dict[str, Any]) -> None:
    module, x = build(**fields), sample()
    names = ("x", "b", "c")
    joined = torch.cat([getattr(module, name)(x) for name in names], dim=-1)
    padded = F.pad(joined.transpose(1, 2), (3, 0))
    joined = F.silu(F.conv1d(padded, module.conv.weight, module.conv.bias, groups=joined.shape[-1])).transpose(1, 2)
    u, b, c = joined.split([module.widths[name] for name in names], dim=-1)
    u = u.unflatten(-1, (4, 16))
    b, c = (part.unflatten(-1, (module.n_groups, -1)).repeat_interleave(4 // module.n_groups, dim=2) for part in (b, c))
    dt = F.softplus(module.dt(x) + module.time_step.dt_bias)  # type: ignore[operator]
    a = -module.time_step.a_log.exp()
    h = x.new_zeros(B, 4, 16, 12)
    outputs = []
    for t in range(T):
        h = (a * dt[:, t]).exp()[..., None, None] * h + torch.einsum(
            "bhp,bhn->bhpn", dt[:, t, :, None] * u[:, t], b[:, t]
        )
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, c[:, t]) + module.skip[:, None] * u[:, t])
    y = torch.stack(outputs, dim=1).flatten(2) * F.silu(module.gate(x))  # type: ignore[operator]
    grouped = y.unflatten(-1, (module.n_groups, -1))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * module.norm.weight
    wanted = module.out(y)
    torch.testing.assert_close(module(x, SeqInfo.contiguous(B, T)), wanted, atol=1e-10, rtol=1e-10)


def test_start_values() -> None:
    module = Mamba2Config(d_head=2).build(context(1024))
    initialise(module, 0)
    dt, rate = F.softplus(module.time_step.dt_bias.detach()), module.time_step.a_log.detach().exp()
    assert 0.00099 < float(dt.min()) < 0.0015 and 0.08 < float(dt.max()) < 0.101
    assert 0.99 < float(rate.min()) < 1.3 and 15.7 < float(rate.max()) <= 16.0
    assert bool((module.skip == 1).all())


def test_state() -> None:
    """The last inputs of the convolution, and S in fp32; heads of a group share their keys."""
    module = build(torch.bfloat16, n_groups=2)
    state = module.new_state(3, 10_000, n_tentative=4, dtype=torch.bfloat16, device="cpu")
    assert isinstance(state, CompositeState)
    memory = state["memory"]
    assert isinstance(memory, RecurrentState)
    assert memory.committed["s"].shape == (3, 4, 12, 16) and memory.committed["s"].dtype == torch.float32
    assert memory.policy == "replay" and memory.factors["k"].shape == (3, 4, 2, 12)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="expand \\* d_model = 64 is not divisible by d_head 48"):
        Mamba2Config(d_head=48).build(context(D))
    with pytest.raises(UserError, match="4 heads .* cannot form n_groups 3"):
        Mamba2Config(d_head=16, n_groups=3).build(context(D))
