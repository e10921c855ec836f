"""Decoder: tokens or embeddings, tying, states, patterns of layers."""

from __future__ import annotations

import pytest
import torch

from llm.core.errors import UserError
from llm.core.init import init_specs, initialise
from llm.core.seq import SeqInfo
from llm.models.config import BlockConfig, ModelConfig
from llm.models.decoder import Decoder
from tests.contracts.checks.harness import tiny_model

ATTENTION = {"type": "attention", "n_heads": 2}
TOKENS = torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(0))


def _decoder(config: ModelConfig) -> Decoder:
    model = config.build("cpu")
    initialise(model, 0)
    return model.eval()


def _logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return model.head(model(tokens, SeqInfo.contiguous(*tokens.shape[:2])).hidden)


@torch.no_grad()
def test_embeddings_stand_in_for_tokens() -> None:
    model = _decoder(tiny_model(ATTENTION, "swiglu", embed={"scale": 3.0}))
    expected = _logits(model, TOKENS)
    assert torch.equal(_logits(model, model.embed(TOKENS)), expected)
    mixed = model.embed(TOKENS).clone()
    mixed[:, 4] = torch.randn(2, 32)
    changed = _logits(model, mixed)
    assert torch.equal(changed[:, :4], expected[:, :4]) and not torch.allclose(changed[:, 4:], expected[:, 4:])
    state = model.new_state(2, 16, dtype=torch.float32, device="cpu")
    first = model(mixed[:, :6], SeqInfo.contiguous(2, 6), state=state).hidden
    rest = model(TOKENS[:, 6:], SeqInfo.contiguous(2, 3, start=6), state=state).hidden
    torch.testing.assert_close(model.head(torch.cat([first, rest], dim=1)), changed, atol=1e-5, rtol=1e-4)


def test_gradients_reach_given_embeddings() -> None:
    model = _decoder(tiny_model(ATTENTION, "swiglu"))
    x = torch.randn(1, 5, 32, requires_grad=True)
    _logits(model, x)[:, -1].sum().backward()
    assert x.grad is not None and bool((x.grad.abs().sum(-1) > 0).all())


def test_tying_survives_materialisation() -> None:
    model = tiny_model(ATTENTION, "swiglu").build("meta")
    assert model.is_tied()
    model.to_empty(device="cpu")
    model.tie()
    initialise(model, 0)
    assert model.is_tied() and model.unembed.weight.data_ptr() == model.embed.weight.data_ptr()
    assert sum(name in ("embed.weight", "unembed.weight") for name, _ in model.named_parameters()) == 1
    _logits(model, TOKENS).sum().backward()
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    assert torch.equal(model.unembed.weight, model.embed.weight)


def test_an_untied_head_is_its_own() -> None:
    model = tiny_model(ATTENTION, "swiglu", head={"tied": False, "bias": True, "softcap": 2.0}).build("meta")
    model = model.to_empty(device="cpu")
    model.tie()
    initialise(model, 0)
    assert not model.is_tied() and not torch.equal(model.unembed.weight, model.embed.weight)
    assert float(_logits(model, TOKENS).detach().abs().max()) < 2.0


def test_a_block_without_a_mixer_keeps_count() -> None:
    config = tiny_model(ATTENTION, "swiglu")
    layers = [{"pattern": [{"channel": "swiglu"}, {"mixer": ATTENTION}], "repeat": 2}]
    model = _decoder(config.replace(layers=layers))
    with torch.no_grad():
        state = model.new_state(2, 16, n_tentative=2, dtype=torch.float32, device="cpu")
        parts = [model(TOKENS[:, :5], SeqInfo.contiguous(2, 5), state=state).hidden]
        assert state.length.tolist() == [5, 5] and state.end().tolist() == [5, 5]
        state.begin(2)
        model(TOKENS[:, :2], SeqInfo.contiguous(2, 2, start=5), state=state)
        state.commit(torch.tensor([0, 0]))
        parts.append(model(TOKENS[:, 5:], SeqInfo.contiguous(2, 4, start=5), state=state).hidden)
        assert {part.length.tolist()[0] for part in state.parts.values()} == {9}
        torch.testing.assert_close(model.head(torch.cat(parts, dim=1)), _logits(model, TOKENS), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_ragged_prompts_equal_single_ones() -> None:
    model = _decoder(tiny_model(ATTENTION, "swiglu"))
    lengths = torch.tensor([4, 9])
    valid = torch.arange(9) < lengths[:, None]
    state = model.new_state(2, 12, dtype=torch.float32, device="cpu")
    seq = SeqInfo.contiguous(2, 9)
    hidden = model(TOKENS, SeqInfo(seq.positions, valid=valid), state=state).hidden
    assert state.length.tolist() == [4, 9]
    torch.testing.assert_close(model.head(hidden[0, :4]), _logits(model, TOKENS[:1, :4])[0], atol=1e-5, rtol=1e-4)
    last = TOKENS[:, -1:]
    step = model(last, SeqInfo.contiguous(2, 1, start=state.end()), state=state).hidden
    alone = _logits(model, torch.cat([TOKENS[:1, :4], last[:1]], dim=1))
    torch.testing.assert_close(model.head(step[0, 0]), alone[0, -1], atol=1e-5, rtol=1e-4)


def test_layers_follow_the_pattern() -> None:
    layers = [
        {"pattern": [{"mixer": ATTENTION, "channel": "swiglu"}, {"channel": "swiglu"}], "repeat": 2},
        {"pattern": [{"mixer": ATTENTION}]},
    ]
    model = tiny_model(ATTENTION, "swiglu").replace(layers=layers).build("meta")
    assert [(b.mixer is not None, b.channel is not None) for _, b in model.blocks()] == [  # type: ignore[attr-defined]
        (True, True),
        (False, True),
        (True, True),
        (False, True),
        (True, False),
    ]
    assert [name for name, _ in model.blocks()] == [f"layers.{i}" for i in range(5)]


def test_init_names_cover_the_state_dict() -> None:
    model = tiny_model(ATTENTION, "swiglu").build("meta")
    covered = {name for name, _, _ in init_specs(model)}
    assert set(model.state_dict()) <= covered
    assert len(model.init_names()) == len(set(model.init_names()))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="a block needs a mixer, a channel, or both"):
        BlockConfig()
    with pytest.raises(UserError, match="vocab_size is not given"):
        tiny_model(ATTENTION, "swiglu").replace(vocab_size=None).build("meta")
