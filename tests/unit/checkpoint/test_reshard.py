"""Checkpoints know names, not ranks: what one layout saved, any other loads."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # an optimizer's first step imports it, which takes a second in each forked rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llm.checkpoint import Checkpointer, TrainState, load_model_tensors
from llm.checkpoint.faults import VARIABLE
from llm.checkpoint.manifest import read_manifest
from llm.core.errors import UserError
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = {"single": 1, "ddp": 2, "fsdp": 2, "fsdp4": 4, "hsdp": 4}
"""Layout -> world size."""


class Net(nn.Module):
    """Dimensions that divide by neither 2 nor 4, and one smaller than 4 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _build(layout: str, seed: int) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    if layout.startswith(("fsdp", "hsdp")):
        world = LAYOUTS[layout]
        shape, names = ((2, 2), ("replicate", "shard")) if layout == "hsdp" else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in net.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def _train(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on data that is the same on every rank."""
    tokens = torch.randint(0, 7, (4,), generator=torch.Generator().manual_seed(seed))
    net(tokens).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _state(net: Net, optimizer: torch.optim.Optimizer, rank: int) -> TrainState:
    model = dict(net.named_parameters())
    optim = {name: optimizer.state[parameter] for name, parameter in model.items()}
    return TrainState(model, optim, {"step": 1}, {"cpu": torch.tensor([100 + rank])})


def _full(state: TrainState) -> dict[str, torch.Tensor]:
    flat = dict(state.model) | {f"{n}/{k}": t for n, slots in state.optim.items() for k, t in slots.items()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in flat.items()}


def _save_rank(rank: int, layout: str, root: Path, step: int, source: int | None) -> dict[str, torch.Tensor]:
    """Build, optionally load step `source`, train a step, save; returns full tensors as they were at the load."""
    net, optimizer = _build(layout, seed=step)
    _train(net, optimizer, seed=step)
    state = _state(net, optimizer, rank)
    checkpointer = Checkpointer(root, keep=9)
    if source is not None:
        info = checkpointer.latest_good()
        assert info is not None and info.step == source
        assert checkpointer.load(info, state) == {"step": 1}
        saved_by = read_manifest(info.path).world_size
        assert state.rng["cpu"].item() == 100 + rank, "saved and own value are the same by construction"
        state.rng["cpu"].zero_()
        checkpointer.load(info, state)
        assert state.rng["cpu"].item() == (100 + rank if rank < saved_by else 0)
        state.rng["cpu"].fill_(100 + rank)
    loaded = _full(state)
    checkpointer.save(state, step=step, tokens=step, kind="regular")
    _train(net, optimizer, seed=99)
    checkpointer.wait()
    assert [info.step for info in checkpointer.poll()] == [step]
    return loaded


def _check_chain(root: Path, layouts: list[str]) -> None:
    """The first layout saves; each next one loads what the one before saved, and saves it again."""
    want = run_ranks(_save_rank, LAYOUTS[layouts[0]], layouts[0], root, 1, None)[0]
    for step, target in enumerate(layouts[1:], start=2):
        for loaded in run_ranks(_save_rank, LAYOUTS[target], target, root, step, step - 1):
            assert loaded.keys() == want.keys()
            for name in want:
                assert torch.equal(loaded[name], want[name]), (target, name)


def test_two_to_four_to_one(tmp_path: Path) -> None:
    _check_chain(tmp_path, ["fsdp", "fsdp4", "single", "hsdp", "ddp", "fsdp"])


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS)
def test_saved_by_one_layout_loaded_by_all(tmp_path: Path, source: str) -> None:
    _check_chain(tmp_path, [layout for target in LAYOUTS for layout in (source, target)])


def test_model_tensors_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    want = run_ranks(_save_rank, 4, "fsdp4", tmp_path, 1, None)[0]
    tensors = load_model_tensors(tmp_path / "step-000000001")
    assert tensors.keys() == {"embed.weight", "head.weight", "head.bias"} | {
        f"layers.{i}.{name}" for i in range(2) for name in ("weight", "bias")
    }
    for name, tensor in tensors.items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("layout", ["ddp", "fsdp4", "hsdp"])
def test_every_element_is_written_once(tmp_path: Path, layout: str) -> None:
    run_ranks(_save_rank, LAYOUTS[layout], layout, tmp_path, 1, None)
    manifest = read_manifest(tmp_path / "step-000000001")
    for name, entry in manifest.tensors.items():
        hits = torch.zeros(entry.shape, dtype=torch.int64)
        for chunk in entry.chunks:
            assert 0 not in chunk.sizes, f"{name}: a rank without a share wrote an empty chunk"
            hits[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert bool((hits == 1).all()), name
    writers = Counter(chunk.file for entry in manifest.tensors.values() for chunk in entry.chunks)
    assert sum(file.startswith("model/") for file in writers) == LAYOUTS[layout], "the ranks share the writing"


def _failing_rank(rank: int, root: Path, asynchronous: bool) -> str:
    net, optimizer = _build("fsdp", seed=0)
    _train(net, optimizer, seed=0)
    checkpointer = Checkpointer(root, asynchronous=asynchronous)
    state = _state(net, optimizer, rank)
    checkpointer.save(state, step=1, tokens=1, kind="regular", wait=True)
    assert len(checkpointer.poll()) == 1
    if rank == 1:
        os.environ[VARIABLE] = "tensors-half-written=full"
    try:
        checkpointer.save(state, step=2, tokens=2, kind="regular")
        while not checkpointer.poll():
            pass
        message = "no error"
    except UserError as error:
        message = str(error)
    os.environ.pop(VARIABLE, None)
    info = checkpointer.latest_good()
    assert info is not None and info.step == 1
    checkpointer.save(state, step=3, tokens=3, kind="regular", wait=True)
    return message


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_full_disk_is_every_ranks_error(tmp_path: Path, asynchronous: bool) -> None:
    messages = run_ranks(_failing_rank, 2, tmp_path, asynchronous)
    assert messages[0] == messages[1] and "step 2 was not saved: no space left" in messages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000000001", "step-000000003"]


def _fallback_rank(rank: int, root: Path) -> Any:
    net, optimizer = _build("fsdp", seed=0)
    _train(net, optimizer, seed=0)
    checkpointer = Checkpointer(root)
    info = checkpointer.latest_good()
    assert info is not None
    state = _state(net, optimizer, rank)
    if rank == 1:
        state.model["extra"] = torch.zeros(2)
    try:
        checkpointer.load(info, state)
    except UserError as error:
        return info.step, str(error)
    return info.step, ""


def test_ranks_agree_on_damage_and_on_a_misfit(tmp_path: Path) -> None:
    for step in (1, 2):
        run_ranks(_save_rank, 2, "fsdp", tmp_path, step, None)
    shard = tmp_path / "step-000000002" / "optim" / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    first, second = run_ranks(_fallback_rank, 2, tmp_path)
    assert first == second
    assert first[0] == 1 and "lacks 1 tensors (model/extra)" in first[1]
