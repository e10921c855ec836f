"""FIT: stages, causality over groups, an independent group-by-group reference, parameters and FLOPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.wrappers.fit import FITConfig, parse_stages
from tests.contracts.checks.decoding import Decoding
from tests.contracts.checks.harness import (
    D_MODEL,
    assert_same,
    count_flops,
    fill,
    n_parameters,
    random,
    tiny_model,
)
from tests.contracts.checks.wrappers import as_mixer

ATTENTION = {"type": "attention", "n_heads": 2}
FIT = {"type": "fit", "stages": "(1)2(1)1(1)", "group": 4, "n_latents": 2, "d_latent": 24, "n_heads": 2}


def _config(n_layers: int = 3, **changes: Any) -> ModelConfig:
    return tiny_model(ATTENTION, "swiglu", n_layers=n_layers, wrappers=[{**FIT, **changes}])


def _model(n_layers: int = 3, **changes: Any) -> Any:
    return fill(_config(n_layers, **changes).build("cpu"))


def _bare(n_layers: int = 3) -> Any:
    return fill(tiny_model(ATTENTION, "swiglu", n_layers=n_layers).build("cpu"))


def _run(model: Any, x: Tensor) -> Tensor:
    return model(x, SeqInfo.contiguous(*x.shape[:2])).hidden


def test_stages() -> None:
    assert parse_stages("(2)4(2)") == [(2, 4), (2, 0)]
    assert parse_stages("(1)1(1)1(10)") == [(1, 1), (1, 1), (10, 0)]
    assert parse_stages("(3)") == [(3, 0)]
    assert parse_stages("(2)4(2)3") == [(2, 4), (2, 3)]
    for wrong in ("", "2(4)2", "(2)4", "(2)(2)", "(2)4(2)x", "()1(1)", "(2)-1(2)", "(2) 4 (2)", "((2))"):
        if wrong == "(2)4":
            assert parse_stages(wrong) == [(2, 4)]
            continue
        with pytest.raises(UserError, match="is not a string such as"):
            parse_stages(wrong)
    for wrong in ("(0)1(1)", "(1)0(1)"):
        with pytest.raises(UserError, match="a stage of no layers"):
            parse_stages(wrong)


@torch.no_grad()
def test_a_token_reaches_every_later_group_and_no_earlier_token() -> None:
    model = _model()
    x = random(1, 22, D_MODEL)
    before = _run(model, x)
    for t in (0, 3, 4, 13):
        changed = x.clone()
        changed[:, t] += 1.0
        difference = (_run(model, changed) - before)[0].abs().amax(dim=-1)
        assert float(difference[:t].max()) < 1e-12 if t else True
        assert bool((difference[t : t - t % 4 + 4] > 1e-6).all()), "the rest of its group"
        assert bool((difference[t - t % 4 + 4 :] > 1e-9).all()), "all tokens of later groups"


def _norm(module: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight + module.bias


def _attend(module: Any, q_in: Tensor, kv_in: Tensor) -> Tensor:
    """Attention of every row of q_in [L, W] to all rows of kv_in [S, W'], head by head, without the residual."""
    q, k, v = module.q(q_in), module.k(kv_in), module.v(kv_in)
    width = q.shape[-1] // module.n_heads
    parts = []
    for h in range(module.n_heads):
        here = slice(h * width, (h + 1) * width)
        parts.append(torch.softmax(q[:, here] @ k[:, here].T / math.sqrt(width), dim=-1) @ v[:, here])
    return module.out(torch.cat(parts, dim=-1))


@torch.no_grad()
def test_groups_one_after_another() -> None:
    """The method once more, for one sequence and one group at a time."""
    model, bare = _model(), _bare()
    x = random(1, 18, D_MODEL)
    expected = []
    memory: list[list[Tensor]] = [[], [], []]
    before = [torch.zeros(2, 24).double() for _ in range(2)]
    for g, tokens in enumerate(x.split(4, dim=1)):
        seq = SeqInfo.contiguous(1, tokens.shape[1])
        y, latents, written = bare.enter(tokens, seq), model.latents[g], []
        for stage in range(3):
            y = bare.run(y, seq, layers=range(stage, stage + 1))
            if stage == 2:
                break
            read, write = model.reads[stage], model.writes[stage]
            latents = latents + _attend(read, _norm(read.q_norm, latents), _norm(read.kv_norm, y[0]))
            for number, layer in enumerate(model.latent_layers[stage]):
                past = memory[2 * stage + number]
                past.append(_norm(layer.mixer_norm, latents))
                latents = latents + _attend(layer, past[-1], torch.cat(past))
                z = _norm(layer.channel_norm, latents)
                latents = latents + layer.channel.down(nn.functional.gelu(layer.channel.up(z)))
            y = y + _attend(write, _norm(write.q_norm, y[0]), _norm(write.kv_norm, before[stage]))[None]
            written.append(latents)
        before = written
        expected.append(bare.final_norm(y))
    assert_same(_run(model, x), torch.cat(expected, dim=1), "outputs")


@torch.no_grad()
def test_one_group_is_the_decoder_with_writes_from_nothing() -> None:
    model, bare = _model(), _bare()
    x = random(2, 4, D_MODEL)
    seq = SeqInfo.contiguous(2, 4)
    y = bare.enter(x, seq)
    for stage in range(3):
        y = bare.run(y, seq, layers=range(stage, stage + 1))
        if stage < 2:
            write = model.writes[stage]
            # Attention to two equal keys gives their value.
            value = write.v(write.kv_norm(torch.zeros(24).double()))
            y = y + write.out(value)
    assert_same(_run(model, x), bare.final_norm(y), "one group")


@torch.no_grad()
def test_without_writes_groups_are_independent() -> None:
    model, bare = _model(), _bare()
    for write in model.writes:
        write.out.weight.zero_()
        write.out.bias.zero_()
    x = random(2, 11, D_MODEL)
    expected = torch.cat([_run(bare, part) for part in x.split(4, dim=1)], dim=1)
    assert_same(_run(model, x), expected, "no writes")
    assert_same(_run(_model(stages="(3)", n_latents=0), x), expected, "no latents")


@torch.no_grad()
def test_the_shift_does_not_change_the_latents() -> None:
    model = _model()
    out: list[Tensor] = []
    into: list[Tensor] = []
    model.latent_layers[0][-1].register_forward_hook(lambda module, args, y: out.append(y))
    model.reads[1].register_forward_pre_hook(lambda module, args: into.append(args[0]))
    _run(model, random(2, 15, D_MODEL))
    assert torch.equal(into[0].reshape(out[0].shape), out[0])


def test_parameters() -> None:
    d, e, n, m, groups = 32, 48, 8, 4, 8
    r = min(d, e)
    changes: dict[str, Any] = {
        "stages": "(1)2(1)1(1)",
        "group": n,
        "n_latents": m,
        "d_latent": e,
        "token_positions": True,
    }

    def cross(q: int, kv: int) -> int:
        return q * r + 2 * kv * r + r * q + 3 * r + q + 2 * q + 2 * kv

    added = 3 * (12 * e * e + 13 * e) + 2 * cross(e, d) + 2 * cross(d, e) + n * d + groups * m * e
    assert n_parameters(_model(**changes)) - n_parameters(_bare()) == added


@pytest.mark.parametrize("length", [8, 16, 32, 64])
def test_attention_flops(length: int) -> None:
    """Local attention is linear in the length with the group as factor, latent attention quadratic in groups."""
    n, m, e, n_latent_layers = 4, 2, 24, 3
    config = _config()
    cost = config.cost(length, "train")
    n_closed = length // n - 1
    pairs = m * m * n_closed * (n_closed + 1) // 2
    assert cost.blocks.attention_flops * length == pytest.approx(n_latent_layers * 4 * e * pairs)
    model = fill(config.build("cpu"), dtype=torch.float32)
    x = random(1, length, D_MODEL, dtype=torch.float32)
    counted, _ = count_flops(lambda: _run(model, x))
    # The counter takes squares as full: of each group in each of 3 layers, and of all latents.
    extra = 3 * 4 * D_MODEL * length * (n - 1) / 2 + n_latent_layers * 4 * e * (m * m * n_closed**2 - pairs)
    assert counted == pytest.approx(cost.blocks.flops_per_token * length + extra, rel=1e-9)


def test_more_groups_than_learned_positions() -> None:
    x = random(1, 72, D_MODEL)
    with pytest.raises(UserError, match="more than 16 groups of 4 tokens .* latent_positions: sinusoidal"):
        _run(_model(), x)
    assert bool(torch.isfinite(_run(_model(latent_positions="sinusoidal"), x)).all())
    decoding = Decoding(as_mixer(_model(latent_positions="sinusoidal")), 1, capacity=72, label="long")
    decoding.feed([66])
    decoding.feed([1])


def test_the_state_grows_by_latents_alone() -> None:
    config = _config(latent_positions="sinusoidal")
    sizes = [config.cost(length, "decode").total.state_bytes_per_seq for length in (400, 800, 1600)]
    per_group = 2 * 3 * 2 * 24 * 2
    assert sizes[1] - sizes[0] == 100 * per_group and sizes[2] - sizes[1] == 200 * per_group


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": "(1)1"}, "would change no output; end with a local stage"),
        ({"stages": "(1)1(1)", "n_latents": 2}, "set group and n_latents"),
        ({"stages": "(1)1(1)", "group": 4}, "set group and n_latents"),
        ({"n_latents": 2}, "n_latents has no effect"),
        ({"token_positions": True}, "set group"),
        ({"stages": "(1)1(1)", "group": 4, "n_latents": 2}, "2 local layers and the model has 3"),
        ({"stages": "(2)1(1)", "group": 4, "n_latents": 2, "d_latent": 24, "n_heads": 5}, "not divisible by n_heads 5"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(ATTENTION, "swiglu", n_layers=3, wrappers=[FITConfig(**fields)]).build("meta")


def test_packed_documents_are_refused_by_name_of_the_setting() -> None:
    with pytest.raises(UserError, match="fit cannot keep documents .* data.packing=pad"):
        _model()(random(1, 8, D_MODEL), SeqInfo.from_lengths([[3, 5]], 8))
