"""int8 matrices: every mixer, channel mixer and wrapper runs on weights that are symmetric int8, row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.init import clean_name
from llm.core.registry import Entry
from llm.core.seq import SeqInfo
from llm.generate.quantize import parameter_bytes, quantize_model
from tests.contracts.checks.harness import VOCAB, assert_same
from tests.contracts.test_speculative import CASES, build, parameters
from tests.contracts.test_speculative import check as check_speculation

pytest.importorskip("torchao")

NO_MATRICES = "glu_token_mixing"
"""All that it has are vectors."""

NEAR = {
    "lmu_spiking": 0.5,  # a spike is there or not
    "conv_channel_spiking": 0.5,
    "memory_ffn": 0.3,  # rows of tables are addressed by signs
    "armt": 0.4,  # its memory divides by small numbers
}
"""Largest relative error of the logits beside full precision, where it is more than 0.06."""


def symmetric(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers [..., d_out, d_in], scales [..., d_out, 1]) in float64: as many steps to each side of zero."""
    scale = weight.double().abs().amax(-1, keepdim=True) / 127.5
    return (weight.double() / scale).round().clamp(-128, 127), scale


def read(model: Any, tokens: Tensor, cuts: list[int]) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] that a decode state takes in pieces."""
    state = model.new_state(len(tokens), 40, dtype=torch.float64, device="cpu")
    logits, start = [], 0
    for n in cuts:
        seq = SeqInfo(positions=state.end()[:, None] + torch.arange(n))
        logits.append(model.head(model(tokens[:, start : start + n], seq, state=state).hidden))
        start += n
    return torch.cat(logits, dim=1)


@torch.no_grad()
def check(kind: str, label: str, entry: Entry[Any]) -> None:
    exact = build(kind, label, entry).float()
    model = copy.deepcopy(exact)
    if entry.name == NO_MATRICES:
        with pytest.raises(UserError, match="no dense matrices that could be quantised"):
            quantize_model(model, "int8")
        return
    found = quantize_model(model, "int8")
    weights = {clean_name(name): p for name, p in exact.named_parameters()}
    rounded = copy.deepcopy(exact).double()
    for name, parameter in rounded.named_parameters():
        if clean_name(name) in found.names:
            weight = weights[clean_name(name)]
            q, scale = symmetric(weight)
            stored: Any = model.get_parameter(name)
            half = ((weight.double() / scale).frac().abs() - 0.5).abs() < 1e-4
            # Of each row the largest one lies between two numbers, and either will do.
            assert torch.equal(stored.qdata[~half].double(), q[~half]) and int(half.sum()) <= len(scale.flatten()) + 2
            assert stored.qdata.dtype == torch.int8 and float((stored.qdata.double() - q).abs().max()) <= 1
            torch.testing.assert_close(stored.scale.double(), scale, rtol=1e-6, atol=0)
            parameter.copy_(torch.where(half, stored.qdata.double(), q) * scale)
    taken = [weights[name] for name in found.names]
    rows = sum(weight.numel() // weight.shape[-1] for weight in taken)
    assert (
        parameter_bytes(model)
        == 4 * sum(p.numel() for p in exact.parameters()) - 3 * sum(weight.numel() for weight in taken) + rows * 5
    ), "one byte a weight, and of each row a scale and torchao's zero"

    model.double()
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    logits = read(model, tokens, [20])
    assert_same(read(model, tokens, [1] * 20), logits, "steps and one prefill")
    assert_same(logits, read(rounded, tokens, [20]), "the quantised model and one of rounded weights", 1e-4)
    full = read(exact.double(), tokens, [20])
    error = float((logits - full).norm() / full.norm())
    assert 1e-5 < error < NEAR.get(entry.name, 0.06), f"logits differ by {error:.3g} from those of full precision"
    check_speculation(model, ["foreteller"], n=10, most=3, batches=[4])


@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] == c[2].name]))
def test_every_part(kind: str, label: str, entry: Entry[Any]) -> None:
    check(kind, label, entry)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] != c[2].name]))
def test_every_variant(kind: str, label: str, entry: Entry[Any]) -> None:
    check(kind, label, entry)
