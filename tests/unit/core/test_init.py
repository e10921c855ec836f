"""Init by name: the same start whatever the layout, and never silently another one."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

from llm.core import init
from tests.distributed.harness import run_ranks

GOLDEN_A = [0.0076883, 0.0437409, 0.0253515]
GOLDEN = "b74b8b189a10e4cf"


class _Leaf(nn.Module):
    def __init__(self, value: init.Init, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.value = value

    def init_spec(self) -> dict[str, init.Init]:
        return {"weight": self.value}


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = _Leaf(init.normal(0.02), 5, 6)
        self.b = _Leaf(init.truncated_normal(0.5, 2.0), 4, 3)
        self.c = nn.ModuleDict({"inner": _Leaf(init.uniform(-1.0, 1.0), 7)})
        self.tied = _Leaf(init.normal(9.0), 5, 6)
        self.tied.weight = self.a.weight
        self.register_buffer("table", torch.empty(3))

    def init_spec(self) -> dict[str, init.Init]:
        return {"table": init.computed(lambda: torch.arange(3.0))}


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _digest(model: nn.Module) -> str:
    rounded = {name: [f"{x:.5f}" for x in tensor.flatten().tolist()] for name, tensor in _values(model).items()}
    return hashlib.sha256(repr(sorted(rounded.items())).encode()).hexdigest()[:16]


def test_golden_values() -> None:
    """Changing these numbers means that every run starts elsewhere than the runs before it."""
    model = _Model()
    init.initialise(model, 0)
    assert model.a.weight[0, :3].tolist() == pytest.approx(GOLDEN_A, abs=1e-6)
    assert _digest(model) == GOLDEN
    init.initialise(model, 1)
    assert _digest(model) != GOLDEN


def test_values_depend_on_seed_and_name_alone() -> None:
    first, second = _Model(), _Model()
    init.initialise(first, 3)
    torch.manual_seed(99)
    second.extra = _Leaf(init.normal(1.0), 11)  # type: ignore[assignment]
    init.initialise(second, 3)
    for name, tensor in _values(first).items():
        assert torch.equal(tensor, _values(second)[name]), name
    assert not torch.equal(first.a.weight[0, :3], first.b.weight[0, :3])
    assert torch.equal(first.tied.weight, first.a.weight)
    assert float(first.a.weight.detach().std()) < 0.05
    assert float(first.b.weight.detach().abs().max()) <= 1.0
    assert first.table.tolist() == [0.0, 1.0, 2.0]  # type: ignore[union-attr]


def test_values_do_not_depend_on_the_default_device_or_dtype() -> None:
    plain, low = _Model(), _Model().to(torch.bfloat16)
    init.initialise(plain, 0)
    with torch.device("meta"):
        init.initialise(low, 0)
    for name, tensor in _values(plain).items():
        assert torch.equal(tensor.bfloat16(), _values(low)[name]), name


def test_wrappers_do_not_change_names() -> None:
    assert (
        init.clean_name("module._orig_mod.layers.0._checkpoint_wrapped_module.mixer.q.weight")
        == "layers.0.mixer.q.weight"
    )
    assert init.clean_name("layers.module.weight") == "layers.module.weight"
    plain, compiled = _Model(), _Model()
    init.initialise(plain, 0)
    init.initialise(torch.compile(compiled), 0)  # type: ignore[arg-type]
    assert torch.equal(plain.b.weight, compiled.b.weight)


def test_what_is_not_covered_or_not_finite_is_named() -> None:
    with pytest.raises(AssertionError, match="Linear.init_spec does not cover 1.weight"):
        init.initialise(nn.Sequential(_Model(), nn.Linear(2, 2)), 0)
    with pytest.raises(AssertionError, match="1.weight is not finite"):
        init.initialise(nn.Sequential(_Model(), _Leaf(init.constant(float("inf")), 2)), 0)


def test_seeds_and_scales() -> None:
    assert init.name_seed(0, "a") != init.name_seed(1, "a") != init.name_seed(0, "b")
    assert 0 <= init.name_seed(5, "x") < 2**63
    assert init.depth_scaled(0.02, 8) == pytest.approx(0.005)


def _sharded(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        model = _Model()
    model.tied.weight = model.a.weight
    fully_shard(model.c["inner"], mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.tied.weight = model.a.weight
    init.initialise(model, 0)
    assert model.a.weight.to_local().shape[0] < 5  # type: ignore[operator]
    full = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in model.state_dict().items()}
    return {name: tensor.detach().tolist() for name, tensor in full.items()}


@pytest.mark.distributed
def test_shards_hold_the_same_values() -> None:
    plain = _Model()
    init.initialise(plain, 0)
    expected = {name: tensor.tolist() for name, tensor in _values(plain).items()}
    for found in run_ranks(_sharded, 2):
        assert found == expected
