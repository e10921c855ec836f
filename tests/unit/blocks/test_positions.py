"""ALiBi slopes, learned and sinusoidal tables."""

from __future__ import annotations

import pytest
import torch

from llm.blocks.mixers.attention import AttentionConfig
from llm.blocks.positions import AlibiConfig, LearnedPositionConfig, SinusoidalConfig
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready


@pytest.mark.parametrize("n_heads", [1, 2, 8, 12, 20])
def test_alibi_slopes_equal_transformers(n_heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    wanted = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(AlibiConfig().build(context()).slopes(n_heads), wanted)


def test_learned_table_and_its_end() -> None:
    module = ready(LearnedPositionConfig().build(context(8, 6)), torch.float32)
    x = torch.zeros(2, 4, 8)
    packed = SeqInfo.from_lengths([[1, 3], [4]], 4)
    torch.testing.assert_close(module.at_embed(x, packed)[0], module.weight[torch.tensor([0, 0, 1, 2])])
    with pytest.raises(UserError, match="7 tokens .* table of 6"):
        module.at_embed(torch.zeros(1, 7, 8), SeqInfo.contiguous(1, 7))
    with pytest.raises(UserError, match="7 tokens"):
        module.at_embed(torch.zeros(1, 1, 8), SeqInfo.contiguous(1, 1, start=6))


@pytest.mark.parametrize("config", [LearnedPositionConfig(), SinusoidalConfig(), AlibiConfig()])
def test_mixers_do_not_own_a_table(config: object) -> None:
    mixer = AttentionConfig(n_heads=2).build(context(position_config=config))
    assert not [name for name, _ in mixer.named_parameters() if name.startswith("position")]


def test_sinusoidal_values() -> None:
    found = SinusoidalConfig().build(context(8)).at_embed(torch.zeros(1, 5, 8), SeqInfo.contiguous(1, 5))
    assert found[0, 3, 1].item() == pytest.approx(torch.tensor(3 / 10000**0.25).sin().item(), abs=1e-6)
    assert found[0, 3, 5].item() == pytest.approx(torch.tensor(3 / 10000**0.25).cos().item(), abs=1e-6)
    with pytest.raises(UserError, match="even"):
        SinusoidalConfig().build(context(9))
