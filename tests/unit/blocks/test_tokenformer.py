"""Pattention against its definition: invariances, shares of tokens, gradients of new tokens, extreme inputs."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.base import InitConfig
from llm.blocks.channels.token_ffn import TokenFFNConfig
from llm.blocks.linears.pattention import (
    Normalization,
    Pattention,
    PattentionConfig,
    mean_square_gelu,
    score_norm,
    token_weights,
)
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from tests.contracts.checks import CHANNEL_CHECKS, LINEAR_CHECKS
from tests.unit.blocks.helpers import context, ready

MODES: tuple[Normalization, ...] = get_args(Normalization)
L2_MODES: tuple[Normalization, ...] = ("l2_norm_gelu", "gelu_l2_norm")


def layer(n: int = 12, d_in: int = 10, d_out: int = 7, *, bias: bool = False, **settings: Any) -> Pattention:
    config = PattentionConfig(n_tokens=n, **settings)
    return ready(config.build(d_in, d_out, bias=bias, std=0.2, init=InitConfig(std=None)))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


OTHERS: list[dict[str, Any]] = [
    {"normalization": "gelu_l2_norm", "approximate": "tanh"},
    {"normalization": "softmax", "n_tokens": 12, "key_std": 0.5},
]


@pytest.mark.parametrize("contract", [name for name in LINEAR_CHECKS if name != "compile"])
@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_contracts_hold_for_other_normalizations(settings: dict[str, Any], contract: str) -> None:
    """Which are not among the pairs of parts: one step of plain SGD at their rate is too long for some of them."""
    LINEAR_CHECKS[contract](PattentionConfig(**settings))


@pytest.mark.parametrize("contract", ["token_wise", "gradients", "params_cost", "flops_cost", "bf16", "init"])
@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_contracts_of_the_feed_forward_layer(settings: dict[str, Any], contract: str) -> None:
    CHANNEL_CHECKS[contract](TokenFFNConfig(**settings))


def test_published_form() -> None:
    """Two products with F.gelu(F.normalize(a) * sqrt(n)) between, but for the epsilon."""
    module, x = layer(bias=True), inputs(2, 5, 10)
    a = x @ module.keys.T
    wanted = F.gelu(F.normalize(a, dim=-1) * 12**0.5) @ module.values + module.bias
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    a = a / (a.norm(dim=-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(module(x), F.gelu(a * 12**0.5) @ module.values + module.bias)


def test_other_normalizations() -> None:
    x = inputs(5, 10)
    module = layer(normalization="gelu_l2_norm")
    g = F.gelu(x @ module.keys.T)
    torch.testing.assert_close(module(x), 12**0.5 * g / (g.norm(dim=-1, keepdim=True) + 1e-5) @ module.values)
    module = layer(normalization="softmax")
    torch.testing.assert_close(module(x), 12 * (x @ module.keys.T).softmax(-1) @ module.values)
    module = layer(normalization="softmax", tau2=1)
    torch.testing.assert_close(module(x), (x @ module.keys.T).softmax(-1) @ module.values)
    module = layer(approximate="tanh")
    a = x @ module.keys.T
    a = a * 12**0.5 / (a.norm(dim=-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(module(x), F.gelu(a, approximate="tanh") @ module.values)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_tokens_is_free(mode: Normalization) -> None:
    module, x = layer(normalization=mode), inputs(5, 10)
    before = module(x)
    order = torch.randperm(12)
    with torch.no_grad():
        for tokens in (module.keys, module.values):
            tokens.copy_(tokens[order].clone())
    torch.testing.assert_close(module(x), before)


def test_a_positive_factor_on_inputs_or_keys_does_nothing() -> None:
    module, x = layer(), inputs(5, 10)
    torch.testing.assert_close(module(1e6 * x), module(1e3 * x), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(module(1e6 * x), module(x), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        before = module(1e6 * x)
        module.keys.mul_(3.0)
    torch.testing.assert_close(module(1e6 * x), before, rtol=1e-7, atol=1e-8)
    assert not torch.allclose(module(-1e6 * x), -before), "a negative one does"


def test_one_token() -> None:
    module, x = layer(n=1), inputs(50, 10)
    sign = (x @ module.keys.T).sign()
    weights = token_weights(1e6 * (x @ module.keys.T), module.tau2)
    gelu = torch.where(sign > 0, 0.8413447, -0.1586553).to(weights.dtype)
    assert set(sign.flatten().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(weights, gelu, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zeros_give_finite_outputs_and_gradients(mode: Normalization, dtype: torch.dtype) -> None:
    module = layer(normalization=mode).to(dtype)
    x = torch.zeros(3, 10, dtype=dtype, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert bool(torch.isfinite(y).all())
    for tensor in (x, module.keys, module.values):
        assert tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())


def test_norm_of_many_half_precision_scores() -> None:
    scores = torch.full((1, 34_480), 30.0, dtype=torch.float16)
    assert float(score_norm(scores, "l2_norm_gelu")) == pytest.approx(30 * 34_480**0.5, rel=1e-3)


@pytest.mark.parametrize("mode", L2_MODES)
def test_masked_tokens_are_removed_tokens(mode: Normalization) -> None:
    """A score times zero, while the scale stays."""
    module, x = layer(normalization=mode), inputs(5, 10)
    keep = torch.arange(12) % 3 != 0
    scores = x @ module.keys.T
    masked = token_weights(scores * keep, module.tau2, mode) @ module.values
    removed = token_weights(scores[:, keep], module.tau2, mode) @ module.values[keep]
    torch.testing.assert_close(masked, removed)


@pytest.mark.parametrize("mode", L2_MODES)
def test_shares_of_the_tokens_add_up(mode: Normalization) -> None:
    """As ranks would compute it: sums of squares first, then sums of outputs."""
    module, x = layer(normalization=mode), inputs(5, 10)
    shares = [slice(0, 5), slice(5, 9), slice(9, 12)]
    scores = [x @ module.keys[share].T for share in shares]
    norm = sum((score_norm(a, mode).square() for a in scores), torch.zeros(1)).sqrt()
    parts = [token_weights(a, module.tau2, mode, norm=norm) @ module.values[share] for a, share in zip(scores, shares)]
    torch.testing.assert_close(sum(parts), module(x))


def grown(module: Pattention, extra: int, *, zero_values: bool = False) -> Pattention:
    more = layer(len(module.keys) + extra)
    with torch.no_grad():
        more.keys[: len(module.keys)] = module.keys
        more.keys[len(module.keys) :] = 0.0
        more.values[: len(module.values)] = module.values
        if zero_values:
            more.values[len(module.values) :] = 0.0
        more.tau2.copy_(module.tau2)
    return more


def test_first_gradients_of_new_tokens() -> None:
    module, x = layer(), inputs(5, 10)
    more = grown(module, 8)
    torch.testing.assert_close(more(x), module(x), rtol=0, atol=1e-12)
    more(x).square().sum().backward()
    assert more.keys.grad is not None and more.values.grad is not None
    assert float(more.values.grad[12:].abs().max()) == 0.0
    assert float(more.keys.grad[12:].abs().min()) > 0.0


def test_zero_keys_with_zero_values_are_dead() -> None:
    more = grown(layer(), 8, zero_values=True)
    more(inputs(5, 10)).square().sum().backward()
    assert more.keys.grad is not None and more.values.grad is not None
    assert float(more.values.grad[12:].abs().max()) == float(more.keys.grad[12:].abs().max()) == 0.0


def test_another_scale_or_a_softmax_cannot_grow_exactly() -> None:
    module, x = layer(20, 64, 64).requires_grad_(False), inputs(50, 64)
    weights = token_weights(x @ module.keys.T, module.tau2)
    wider = token_weights(x @ module.keys.T, torch.tensor(30))
    assert float((wider - weights).norm() / weights.norm()) > 0.1
    softmax = token_weights(F.pad(x @ module.keys.T, (0, 10)), module.tau2, "softmax")[:, :20]
    exact = token_weights(x @ module.keys.T, module.tau2, "softmax")
    assert float((softmax - exact).norm() / exact.norm()) > 0.1


def test_scale_is_stored_as_a_whole_number() -> None:
    """So that no conversion of the model to bf16 rounds it."""
    module = layer(n=2141).to(torch.bfloat16)
    assert module.tau2.dtype == torch.int64 and int(module.tau2) == 2141
    assert "tau2" in module.state_dict()


def test_mean_square_gelu() -> None:
    z = torch.randn(400_000)
    for variance in (1.0, 0.3, 4.0):
        assert mean_square_gelu(variance) == pytest.approx(float(F.gelu(z * variance**0.5).square().mean()), rel=0.02)


def test_feed_forward_layer_is_one_pattention() -> None:
    channel = ready(TokenFFNConfig().build(context()))
    assert tuple(channel.tokens.keys.shape) == (128, 32)
    x = inputs(2, 5, 32)
    torch.testing.assert_close(channel(x, SeqInfo.contiguous(2, 5)), channel.tokens(x))


def test_published_start_values_and_shapes() -> None:
    config = ModelConfig.model_validate({"variant": "tokenformer-150m"})
    model = config.build("meta")
    names = dict(model.named_parameters())
    assert tuple(names["layers.0.mixer.out.keys"].shape) == (768, 768)
    assert tuple(names["layers.0.channel.tokens.values"].shape) == (3072, 768)
    assert not [name for name in names if name.startswith("layers.0.residual")], "norms in blocks have no parameters"
    small = config.replace(variant=None, layers=[{"pattern": [config.blocks()[0]]}], vocab_size=8).build("cpu")
    initialise(small, 0)
    value_std = 2 / (12 * 768**0.5)
    for part in (small.layers[0].mixer.v, small.layers[0].channel.tokens):  # type: ignore[union-attr]
        assert float(part.keys.std().detach()) == pytest.approx(0.02, rel=0.02)
        assert float(part.values.std().detach()) == pytest.approx(value_std, rel=0.02)


def test_decode_state_does_not_depend_on_the_number_of_tokens() -> None:
    sizes = []
    for n in (8, 80):
        block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "token_ffn", "n_tokens": 4 * n}}
        config = ModelConfig.model_validate(
            {
                "vocab_size": 11, "d_model": 32, "max_seq_len": 16, "layers": [{"pattern": [block]}],
                "linear": {"*": {"type": "pattention", "n_tokens": n}},
            }
        )  # fmt: skip
        model = config.build("cpu")
        initialise(model, 0)
        tokens = torch.randint(11, (1, 9))
        state = model.new_state(1, 16, dtype=torch.float32, device="cpu")
        parts = [
            model(tokens[:, a:b], SeqInfo.contiguous(1, b - a, start=state.end()), state=state).hidden
            for a, b in ((0, 5), (5, 6), (6, 9))
        ]
        whole = model(tokens, SeqInfo.contiguous(1, 9)).hidden
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        sizes.append(state.nbytes())
    assert sizes[0] == sizes[1]
