"""A small state to save, and what the checkpoint tests share."""

from __future__ import annotations

from pathlib import Path

import torch

from llm.checkpoint import Checkpointer, TrainState

SHAPES = {"embed.weight": (7, 4), "layers.0.w": (4, 6), "layers.0.norm": (4,), "head.scale": ()}


def make_state(seed: int) -> TrainState:
    """A state whose every value follows from `seed`; two bf16 and integer tensors among them."""
    rng = torch.Generator().manual_seed(seed)
    model = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    model["layers.0.half"] = torch.randn(5, 3, generator=rng).bfloat16()
    model["layers.0.mask"] = torch.arange(6).view(2, 3) % 2 == 0
    optim = {
        name: {"exp_avg": torch.randn(shape, generator=rng), "step": torch.tensor(float(seed))}
        for name, shape in SHAPES.items()
    }
    meta = {"step": seed, "loader": {"index": seed * 8}, "lr": 0.1 + seed}
    cpu = torch.randint(0, 255, (16,), generator=rng, dtype=torch.uint8)
    return TrainState(model, optim, meta, {"cpu": cpu, "python": torch.tensor([seed])})


def values(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor of a state by one name."""
    flat = {f"model/{name}": tensor for name, tensor in state.model.items()}
    flat |= {f"optim/{name}/{key}": t for name, slots in state.optim.items() for key, t in slots.items()}
    return flat | {f"rng/{name}": tensor for name, tensor in state.rng.items()}


def assert_same(left: TrainState, right: TrainState) -> None:
    """Bitwise equality of all tensors, names and dtypes."""
    a, b = values(left), values(right)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def save_steps(root: Path, *steps: int, **options: object) -> Checkpointer:
    """A checkpointer that has saved `make_state(step)` at each of `steps`."""
    checkpointer = Checkpointer(root, asynchronous=False, **options)  # type: ignore[arg-type]
    for step in steps:
        checkpointer.save(make_state(step), step=step, tokens=step * 100, kind="regular")
    return checkpointer


def steps_of(checkpointer: Checkpointer) -> list[int]:
    """Steps of the committed checkpoints."""
    return [info.step for info in checkpointer.list()]
