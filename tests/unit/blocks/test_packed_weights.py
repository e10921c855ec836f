"""Weights kept a second time for a few rows: the same products, made again when a weight changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from llm.blocks.base import InitConfig
from llm.blocks.linears import packed
from llm.blocks.linears.dense import DenseLinear, let_join, project
from llm.blocks.linears.packed import MOST_ROWS, let_pack
from llm.core.compat import packs_weights

pytestmark = pytest.mark.skipif(not packs_weights(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_NUMBERS", 1)


def layers(*n_out: int, bias: bool = False) -> nn.ModuleList:
    torch.manual_seed(0)
    found = [DenseLinear(24, n, bias=bias, std=0.1, init=InitConfig()) for n in n_out]
    for parameter in nn.ModuleList(found).parameters():
        nn.init.normal_(parameter)
    return nn.ModuleList(found)


def reference(layer: nn.Module, x: Tensor) -> Tensor:
    y = x.double() @ layer.weight.double().t()
    return (y if layer.bias is None else y + layer.bias.double()).float()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_products_are_the_same(bias: bool, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = layers(8, 20, 12, bias=bias)
    let_join(parts)
    let_pack(parts)
    made: list[tuple[int, ...]] = []
    pack = packed.pack_weight
    monkeypatch.setattr(packed, "pack_weight", lambda w, n: made.append(tuple(w.shape)) or pack(w, n))
    with torch.inference_mode():
        for shape in ((1,), (3,), (4,), (2, 3), (MOST_ROWS,), (MOST_ROWS + 1,), (2, 40)):
            x = torch.randn(*shape, 24)
            found = project(x, *parts) if joined else [part(x) for part in parts]
            torch.testing.assert_close(list(found), [reference(part, x) for part in parts])
    assert made == ([(40, 24)] if joined else [(8, 24), (20, 24), (12, 24)]), "once each, where 4 to 32 rows needed it"


@torch.no_grad()
def test_changed_converted_and_copied_weights_are_seen() -> None:
    x = torch.randn(5, 24)
    for change in ("in place", "loaded", "replaced", "copied", "converted"):
        parts = layers(8, 20)
        let_pack(parts)
        before = [part(x) for part in parts]
        if change == "in place":
            parts[1].weight.mul_(2)
        elif change == "loaded":
            parts.load_state_dict({name: value + 1 for name, value in parts.state_dict().items()})
        elif change == "replaced":
            parts[1].weight.data = torch.ones(20, 24)
        elif change == "copied":
            parts = copy.deepcopy(parts)
            parts[1].weight.add_(1)
        else:
            parts = parts.double().float()
            parts[1].weight.neg_()
        after = [part(x) for part in parts]
        torch.testing.assert_close(after, [reference(part, x) for part in parts])
        assert not torch.allclose(after[1], before[1]), change


def test_gradients_and_other_dtypes_take_the_ordinary_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "packed_linear", lambda *_: pytest.fail("packed"))
    parts = layers(8)
    let_pack(parts)
    parts[0](torch.randn(5, 24)).sum().backward()
    assert parts[0].weight.grad is not None
    with torch.no_grad():
        parts.double()[0](torch.randn(5, 24, dtype=torch.float64))


@torch.no_grad()
def test_a_model_on_another_device_lets_go_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = layers(8)
    let_pack(parts)
    parts[0](torch.randn(5, 24))
    copied = parts[0].packed
    assert isinstance(copied, packed.Packed) and copied.weight is not None
    monkeypatch.setattr(packed, "packed_linear", lambda *_: pytest.fail("packed"))
    assert parts.to("meta")[0](torch.randn(5, 24, device="meta")).shape == (5, 8)
    assert copied.weight is None and not copied.sources
