"""Weights of layers that are applied together: one tensor for inference, parameters as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.blocks.base import InitConfig
from llm.blocks.linears.dense import DenseLinear, let_join, project, project_joined


def three_layers() -> Any:
    torch.manual_seed(0)
    layers = [DenseLinear(6, n, bias=False, std=0.1, init=InitConfig()) for n in (4, 2, 3)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
    return torch.nn.ModuleList(layers)


@torch.no_grad()
def test_joined_once_and_never_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = three_layers(), torch.randn(2, 6)
    apart = [layer(x) for layer in layers]
    let_join(layers)
    project(x, *layers)
    let_join(layers)
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("weights were copied"))
    torch.testing.assert_close(list(project(x, *layers)), apart)
    assert layers[1].weight.untyped_storage().data_ptr() == layers[0].weight.untyped_storage().data_ptr()


@torch.no_grad()
def test_changes_of_a_parameter_are_seen() -> None:
    layers, x = three_layers(), torch.randn(2, 6)
    let_join(layers)
    project(x, *layers)
    layers[1].weight.mul_(2)
    layers.load_state_dict({name: tensor + 1 for name, tensor in layers.state_dict().items()})
    torch.testing.assert_close(list(project(x, *layers)), [layer(x) for layer in layers])


@torch.no_grad()
def test_replaced_converted_and_copied_parameters_are_seen() -> None:
    x = torch.randn(2, 6)
    for change in ("replace", "convert", "copy"):
        layers = three_layers()
        let_join(layers)
        project(x, *layers)
        if change == "replace":
            layers[0].weight.data = torch.ones(4, 6)
        layers = layers.double() if change == "convert" else copy.deepcopy(layers) if change == "copy" else layers
        layers[2].weight.add_(1)
        y = x.to(layers[0].weight)
        torch.testing.assert_close(list(project(y, *layers)), [layer(y) for layer in layers])


def test_training_does_not_join() -> None:
    layers, x = three_layers(), torch.randn(2, 6)
    let_join(layers)
    joined = project_joined(x, *layers)
    assert joined is not None and layers[0].joined is None
    joined.sum().backward()
    assert all(layer.weight.grad is not None for layer in layers)


@torch.no_grad()
def test_overlapping_groups_and_files(tmp_path: Path) -> None:
    layers, x = three_layers(), torch.randn(2, 6)
    let_join(layers)
    project(x, *layers[1:])
    torch.testing.assert_close(list(project(x, *layers)), [layer(x) for layer in layers])
    save_file(
        {name: weight.contiguous() for name, weight in layers.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    for name, tensor in load_file(tmp_path / "weights.safetensors").items():
        assert torch.equal(tensor, layers.state_dict()[name])
