"""Feed-forward layers against formulas and published blocks; the mixture of experts against dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.base import after_step
from llm.blocks.channels.activations import ACTIVATIONS, gated
from llm.blocks.channels.gated import GeGLUConfig, SwiGLUConfig
from llm.blocks.channels.mlp import MLPConfig
from llm.blocks.channels.moe import MoE, MoEConfig, grouped_linear
from llm.core import aux_loss
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, default_dtype, ready

D = 32
SEQ = SeqInfo.contiguous(2, 7)


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 7, D, dtype=dtype)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "relu2", "silu"])
def test_mlp(name: str) -> None:
    channel = ready(MLPConfig(d_hidden=24, activation=name, bias=True).build(context()))  # type: ignore[arg-type]
    x = tokens()
    formulas = {
        "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
        "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
        "relu": lambda h: h.clamp_min(0),
        "relu2": lambda h: h.clamp_min(0) ** 2,
        "silu": lambda h: h / (1 + torch.exp(-h)),
    }
    hidden = formulas[name](x @ channel.up.weight.T + channel.up.bias)
    torch.testing.assert_close(channel(x, SEQ), hidden @ channel.down.weight.T + channel.down.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [SwiGLUConfig, GeGLUConfig])
def test_gated(config: Any, bias: bool) -> None:
    channel = ready(config(d_hidden=24, bias=bias).build(context()))
    x = tokens()
    wanted = channel.down(ACTIVATIONS[channel.activation](channel.gate(x)) * channel.up(x))
    torch.testing.assert_close(channel(x, SEQ), wanted)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_gate_gradient(name: str) -> None:
    joined = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated(x, name), joined)
    gate, up = joined.chunk(2, -1)
    torch.testing.assert_close(gated(joined, name), ACTIVATIONS[name](gate) * up)


def dense_moe(moe: MoE, x: Tensor) -> Tensor:
    """All experts on all tokens, the unchosen ones times zero."""
    config, flat = moe.config, x.flatten(0, 1)
    logits = flat @ moe.router.weight.T
    scores = torch.softmax(logits, -1) if config.router == "softmax" else torch.sigmoid(logits)
    ranked = scores + moe.balance if config.balance_rate else scores
    weights = torch.zeros_like(scores)
    for row in range(flat.shape[0]):
        best = sorted(range(config.n_experts), key=lambda e: -float(ranked[row, e].detach()))[: config.top_k]
        for expert in best:
            weights[row, expert] = scores[row, expert]
    if config.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(flat)
    for expert in range(config.n_experts):
        hidden = F.silu(flat @ moe.gate[expert].T) * (flat @ moe.up[expert].T)
        out = out + config.route_scale * weights[:, expert, None] * (hidden @ moe.down[expert].T)
    if moe.shared is not None:
        out = out + moe.shared.down(F.silu(moe.shared.gate(flat)) * moe.shared.up(flat))
    return out.view(x.shape)


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(n_experts=5, top_k=2, d_hidden=8),
        MoEConfig(n_experts=5, top_k=1, d_hidden=8, normalize=False, n_shared=2),
        MoEConfig(n_experts=4, top_k=3, d_hidden=8, router="sigmoid", route_scale=2.5, balance_rate=0.1),
        MoEConfig(n_experts=3, top_k=3, d_hidden=8, router="sigmoid", normalize=False),
    ],
)
def test_moe_equals_dense(config: MoEConfig) -> None:
    moe = ready(config.build(context())).eval()
    if config.balance_rate:
        moe.balance.copy_(torch.linspace(-0.3, 0.3, config.n_experts))
    x = tokens().requires_grad_()
    found, wanted = moe(x, SEQ), dense_moe(moe, x)
    torch.testing.assert_close(found, wanted)
    leaves = [x, *moe.parameters()]
    upstream = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_moe_equals_transformers(family: str) -> None:
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Theirs

        config = Config(hidden_size=D, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Theirs

        config = Config(
            hidden_size=D, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False
        )
    config._experts_implementation = "eager"
    with default_dtype(torch.float64):
        theirs = Theirs(config).eval()
    ours = MoEConfig(n_experts=6, top_k=2, d_hidden=24, normalize=family == "mixtral").build(context()).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        ours.router.weight.copy_(theirs.gate.weight)
        gate, up = theirs.experts.gate_up_proj.chunk(2, dim=1)
        ours.gate.copy_(gate), ours.up.copy_(up), ours.down.copy_(theirs.experts.down_proj)
    x = tokens()
    # transformers has fp32 router probabilities also for fp64 models
    torch.testing.assert_close(ours(x, SEQ), theirs(x), rtol=1e-5, atol=1e-5)


def test_grouped_linear_with_an_empty_expert() -> None:
    rows = torch.randn(6, 8)
    weight = torch.randn(3, 16, 8)
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    wanted = torch.cat([rows[:2] @ weight[0].T, rows[2:] @ weight[2].T])
    torch.testing.assert_close(grouped_linear(rows, weight, offsets), wanted)
    low = grouped_linear(rows.bfloat16(), weight, offsets)
    torch.testing.assert_close(low.float(), wanted, rtol=0.05, atol=0.1)


def test_balance_loss_is_one_when_balanced_and_reaches_the_router() -> None:
    moe = ready(MoEConfig(n_experts=4, top_k=1, d_hidden=8, aux_weight=0.5, z_weight=0.25).build(context(4))).train()
    with torch.no_grad():
        moe.router.weight.copy_(1e-9 * torch.eye(4))
    x = torch.eye(4, dtype=torch.float64)[None]
    aux_loss.take_values()
    out = moe(x, SeqInfo.contiguous(1, 4))
    values = aux_loss.take_values()
    assert values["moe_balance/layer0"].item() == pytest.approx(1.0)
    assert values["moe_z/layer0"].item() == pytest.approx(torch.tensor(4.0).log().item() ** 2, rel=1e-6)
    (0.0 * out.sum()).backward()
    assert moe.router.weight.grad.abs().sum() > 0, "the auxiliary losses alone move the router"


def test_balance_by_bias_moves_towards_balance() -> None:
    moe = ready(
        MoEConfig(n_experts=4, top_k=1, d_hidden=8, router="sigmoid", aux_weight=0.0, balance_rate=0.05).build(
            context()
        )
    ).train()
    with torch.no_grad():
        moe.router.weight[0] += 0.3
    x = torch.rand(8, 16, D, dtype=torch.float64)
    shares = []
    for _ in range(60):
        moe(x, SeqInfo.contiguous(8, 16))
        shares.append(float(moe.load.max() / moe.load.sum()))
        after_step(moe, lambda load: 2 * load)
        assert not moe.load.any()
    assert shares[0] > 0.9 and shares[-1] < 0.6, (shares[0], shares[-1])
    moe.eval()(x, SeqInfo.contiguous(8, 16))
    assert not moe.load.any(), "evaluation does not count"


def test_moe_cost() -> None:
    config = MoEConfig(n_experts=5, top_k=2, d_hidden=8, n_shared=1)
    moe = config.build(context())
    cost = config.cost(context().dims(), 16, "train")
    assert cost.params == sum(p.numel() for p in moe.parameters())
    unused = 3 * sum(p.numel() for p in (moe.gate, moe.up, moe.down)) // 3 * 3 // 5
    assert cost.active_params == cost.params - unused
    assert cost.flops_per_token == 2 * cost.active_params


def test_more_choices_than_experts() -> None:
    with pytest.raises(ValueError, match="top_k 3 is more than n_experts 2"):
        MoEConfig(n_experts=2, top_k=3, d_hidden=8)
