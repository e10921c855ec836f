"""Memory Layers and the MemoryFormer block against formulas and torch's embedding bag."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.memory_layer import hash_codes, hash_weights
from kernels.memory_layer.hashing import Weighting
from llm.blocks.base import InitConfig
from llm.blocks.channels.memory_ffn import MemoryFFNConfig
from llm.blocks.linears.dense import project
from llm.blocks.linears.memory_layer import MemoryLayer, MemoryLayerConfig, mean_square_weight
from llm.blocks.mixers.attention import AttentionConfig
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from tests.contracts.checks import CHANNEL_CHECKS, LINEAR_CHECKS
from tests.contracts.checks.harness import count_flops
from tests.unit.blocks.helpers import context, ready

WEIGHTINGS: tuple[Weighting, ...] = ("l1_prob", "prob")
INIT = InitConfig(std=None)


def layer(d_in: int = 24, d_out: int = 7, *, bias: bool = True, **settings: Any) -> MemoryLayer:
    config = MemoryLayerConfig(**{"n_bits": 4, **settings})
    return ready(config.build(d_in, d_out, bias=bias, std=0.2, init=INIT))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_embedding_bag(module: MemoryLayer, x: Tensor) -> Tensor:
    """The oracle: one weighted bag of K rows per token, [N, d_in] -> [N, d_out]."""
    z = x.unflatten(-1, (-1, module.n_bits))
    places = torch.tensor([2.0**j for j in reversed(range(module.n_bits))], dtype=x.dtype)
    index = ((z >= 0) * places).sum(-1).long() + 2**module.n_bits * torch.arange(z.shape[-2])
    p = (1 / (1 + torch.exp(-2 * z.abs() / module.temperature))).prod(-1)
    if module.weighting == "l1_prob":
        p = p * z.abs().sum(-1)
    y = F.embedding_bag(index, module.tables.flatten(0, 1), mode="sum", per_sample_weights=p)
    return y if module.bias is None else y + module.bias


SETTINGS: list[dict[str, Any]] = [
    {"n_bits": 4},
    {"n_bits": 8},
    {"n_bits": 4, "weighting": "prob", "temperature": 0.5},
    {"n_bits": 2, "weighting": "prob"},
]


@pytest.mark.parametrize("contract", [name for name in LINEAR_CHECKS if name != "compile"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_contracts_hold_for_further_settings(settings: dict[str, Any], contract: str) -> None:
    """Several bits and the paper's weights, which jump more where a sign flips than the pairs of parts can bear."""
    LINEAR_CHECKS[contract](MemoryLayerConfig(**settings))


@pytest.mark.parametrize("contract", ["gradients", "params_cost", "flops_cost", "bf16", "init"])
@pytest.mark.parametrize("settings", [{"n_bits": 8}, {"n_bits": 4, "weighting": "prob", "norm": None}], ids=str)
def test_contracts_of_the_feed_forward_layer(settings: dict[str, Any], contract: str) -> None:
    CHANNEL_CHECKS[contract](MemoryFFNConfig(**settings))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_embedding_bag(settings: dict[str, Any], bias: bool) -> None:
    module, x = layer(bias=bias, **settings), inputs(5, 24)
    torch.testing.assert_close(module(x), by_embedding_bag(module, x))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_by_hand(weighting: Weighting) -> None:
    module = layer(weighting=weighting)
    x = inputs(9, 24).requires_grad_()
    upstream = inputs(9, 7)
    found_x, found_tables = torch.autograd.grad(module(x), [x, module.tables], upstream)

    z = x.detach().view(9, 6, 4)
    codes, product, total = hash_codes(z), hash_weights(z, "prob"), z.abs().sum(-1)
    rows = module.tables.detach()[torch.arange(6), codes]
    inner = (upstream[:, None] * rows).sum(-1)
    away = torch.sigmoid(-2 * z.abs())
    slope = 2 * away if weighting == "prob" else 1 + 2 * total[..., None] * away
    wanted_x = (inner * product)[..., None] * z.sign() * slope
    torch.testing.assert_close(found_x, wanted_x.flatten(1))

    p = product if weighting == "prob" else product * total
    wanted_tables = torch.zeros_like(module.tables)
    for n in range(9):
        for k in range(6):
            wanted_tables[k, codes[n, k]] += p[n, k] * upstream[n]
    torch.testing.assert_close(found_tables, wanted_tables)
    untouched = torch.ones(6, 16, dtype=torch.bool)
    untouched[torch.arange(6).expand(9, 6), codes] = False
    assert bool(untouched.any()) and not bool(found_tables[untouched].any())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_jumps_by_the_difference_of_two_rows(weighting: Weighting) -> None:
    module, x = layer(weighting=weighting), inputs(1, 24)
    below, above = x.clone(), x.clone()
    below[0, 6], above[0, 6] = -1e-13, 1e-13
    z = above.view(6, 4)
    code = int(hash_codes(z)[1])
    assert code & 2, "element 2 of piece 1 has place value 2"
    jump = hash_weights(z, weighting)[1] * (module.tables[1, code] - module.tables[1, code ^ 2])
    torch.testing.assert_close((module(above) - module(below))[0], jump, rtol=1e-9, atol=1e-10)


def test_one_bit_is_a_matrix_in_the_limit() -> None:
    module = layer(n_bits=1, bias=False)
    weight = inputs(24, 7)
    with torch.no_grad():
        module.tables.copy_(torch.stack([-weight, weight], dim=1))
    direction = inputs(5, 24)
    direction = direction.sign() * (direction.abs() + 0.5)
    errors = []
    for scale in (1.0, 4.0, 16.0):
        wanted = scale * direction @ weight
        errors.append(float((module(scale * direction).detach() - wanted).abs().max() / wanted.abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equal_rows_give_the_weight_for_any_sign(weighting: Weighting) -> None:
    module, x = layer(weighting=weighting, bias=False), inputs(1, 24)
    row = inputs(7)
    with torch.no_grad():
        module.tables.zero_()
        module.tables[2] = row
    wanted = hash_weights(x.view(6, 4), weighting)[2] * row
    for signs in (1.0, -1.0, inputs(1, 24).sign()):
        torch.testing.assert_close(module(x.abs() * signs)[0], wanted)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_mean_square_weight(settings: dict[str, Any]) -> None:
    config = MemoryLayerConfig(**settings)
    z = torch.randn(400_000, config.n_bits)
    sampled = float(hash_weights(z, config.weighting, config.temperature).square().mean())
    found = mean_square_weight(config.n_bits, config.weighting, config.temperature)
    assert found == pytest.approx(sampled, rel=0.02)


def test_means_for_eight_bits_are_the_published_ones() -> None:
    z = torch.randn(400_000, 8)
    assert float(hash_weights(z, "l1_prob").mean()) == pytest.approx(0.97, abs=0.01)
    assert float(hash_weights(z, "prob").mean()) == pytest.approx(0.134, abs=0.002)


def test_start_values_can_be_given() -> None:
    assert float(layer(table_std=0.02, d_out=400).tables.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_one_hash_for_q_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ready(AttentionConfig(n_heads=2, qkv_bias=True).build(context(linears={"mixer.*": MemoryLayerConfig()})))
    x = inputs(2, 5, 32)
    calls = []
    address = MemoryLayer.address
    monkeypatch.setattr(MemoryLayer, "address", lambda self, x: calls.append(1) or address(self, x))
    together = project(x, module.q, module.k, module.v)
    assert len(calls) == 1
    for found, part in zip(together, (module.q, module.k, module.v)):
        assert torch.equal(found, part(x))


def test_different_hashes_stay_apart() -> None:
    parts = [layer(n_bits=4), layer(n_bits=8), layer(n_bits=4, weighting="prob")]
    x = inputs(5, 24)
    for found, part in zip(project(x, *parts), parts):
        assert torch.equal(found, part(x))


def test_feed_forward_layer_written_out() -> None:
    channel = ready(MemoryFFNConfig(n_bits=8).build(context()))
    x = inputs(2, 5, 32)
    hidden = by_embedding_bag(channel.first, x.flatten(0, 1))
    assert hidden.shape[-1] == 40, "1.25 times the width for 2 more bits of 8"
    normed = F.layer_norm(hidden, (40,), channel.norm.weight, channel.norm.bias, 1e-5)
    wanted = by_embedding_bag(channel.second, normed).view_as(x)
    torch.testing.assert_close(channel(x, SeqInfo.contiguous(2, 5)), wanted)


def test_more_tables_instead_of_more_bits() -> None:
    first, between, second = MemoryFFNConfig(n_bits=8, extra_bits=0, table_factor=2).layers(64)
    assert (first.n_tables(64), between, second.n_tables(between), second.n_bits) == (8, 128, 16, 8)


def test_multiply_adds_of_a_block() -> None:
    """K (4 d + d1) look-ups beside attention itself."""
    block = {
        "mixer": {"type": "attention", "n_heads": 2, "qkv_bias": True, "out_proj": False},
        "channel": {"type": "memory_ffn", "n_bits": 8},
    }
    config = ModelConfig.model_validate(
        {"vocab_size": 11, "d_model": 64, "layers": [{"pattern": [block]}], "linear": {"mixer.*": "memory_layer"}}
    )
    cost = config.cost(16).blocks
    assert cost.flops_per_token - cost.attention_flops == 2 * 8 * (4 * 64 + 80)
    model = config.build("cpu")
    ready(model, torch.float32)
    module, seq = model.layers[0], SeqInfo.contiguous(2, 16)  # type: ignore[union-attr]
    module.prepare(seq, torch.float32)
    contractions, _ = count_flops(lambda: module(torch.randn(2, 16, 64), seq))
    square = 2 * 2 * 16 * 16 * 64 * 2
    assert contractions == 2 * 16 * 2 * 8 * (4 * 64 + 80) + square


def test_layout_of_tables_survives_a_file(tmp_path: Path) -> None:
    """Table first, then the row that the hash names."""
    from safetensors.torch import load_file, save_file

    module = layer(8, 1, n_bits=4, bias=False)
    with torch.no_grad():
        module.tables.copy_(torch.arange(32.0).view(2, 16, 1))
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "x.safetensors")
    back = layer(8, 1, n_bits=4, bias=False)
    back.load_state_dict(load_file(tmp_path / "x.safetensors"))
    x = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1], dtype=torch.float64)
    p = hash_weights(x.view(2, 4), "l1_prob")
    torch.testing.assert_close(back(x), (p[0] * 0b1011 + p[1] * (16 + 0b0010)).view(1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MemoryLayerConfig(n_bits=8).build(30, 8, bias=False, std=1.0, init=INIT), "set n_bits to one of 1, 2"),
        (lambda: MemoryLayerConfig(n_bits=8).cost(30, 8, bias=False), "30 cannot be cut into pieces of n_bits 8"),
        (lambda: MemoryLayerConfig(temperature=2.0), "temperature has no effect with weighting l1_prob"),
        (lambda: MemoryFFNConfig(n_bits=7).build(context()), "d_model 32 cannot be cut into pieces of n_bits 7"),
        (lambda: AttentionConfig(n_heads=2, out_proj=False, out_bias=True), "out_bias has no effect"),
        (lambda: AttentionConfig(n_heads=2, d_head=8, out_proj=False).build(context()), "must be d_model 32 wide"),
    ],
)
def test_mistakes_are_named(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_without_an_output_projection_heads_go_out_as_they_are() -> None:
    seq = SeqInfo.contiguous(2, 5)
    without = ready(AttentionConfig(n_heads=2, out_proj=False).build(context()))
    with_one = ready(AttentionConfig(n_heads=2).build(context()))
    with torch.no_grad():
        with_one.out.weight.copy_(torch.eye(32))
    x = inputs(2, 5, 32)
    torch.testing.assert_close(without(x, seq), with_one(x, seq))
    assert not [name for name, _ in without.named_parameters() if name.startswith("out")]


def test_published_start_values() -> None:
    config = ModelConfig.model_validate({"variant": "memoryformer-tiny"})
    assert config.linear["mixer.[qkv]"].table_std == pytest.approx(math.sqrt(2 / (5 * 512)), abs=1e-6)  # type: ignore[attr-defined]
    assert config.context(0).linear_config("mixer.v").type == "memory_layer"
    assert config.context(0).linear_config("mixer.out").type == "dense"
