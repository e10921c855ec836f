"""What a checkpoint holds, and what is known of one on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

Kind = Literal["regular", "keep", "preempt", "final"]
"""regular and preempt fall to the retention rule; keep and final are never deleted."""

KINDS: tuple[str, ...] = ("regular", "keep", "preempt", "final")
KEPT: frozenset[str] = frozenset({"keep", "final"})
PARTS: frozenset[str] = frozenset({"model", "optim", "rng"})


@dataclass
class TrainState:
    """Everything that a run needs to go on.

    model: dotted name -> live tensor or DTensor; a load fills them in place.
    optim: parameter name -> {"exp_avg": tensor, ..., "step": tensor}, live as well.
    meta: JSON data: step, tokens, loader and callback states, fingerprint, config hash, git revision.
    rng: this rank's RNG states, uint8 or int64 tensors; saved per rank, so on another world size a rank without one
        keeps its own.
    """

    model: dict[str, Tensor]
    optim: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint on disk. complete: its manifest is readable and every file is there in full."""

    path: Path
    step: int
    tokens: int
    kind: str
    complete: bool


def flatten(state: TrainState, parts: frozenset[str] = PARTS) -> dict[str, Tensor]:
    """Tensors that are shared over ranks, by "model/<name>" and "optim/<parameter>/<key>"."""
    flat: dict[str, Tensor] = {}
    if "model" in parts:
        flat.update({f"model/{name}": tensor for name, tensor in state.model.items()})
    if "optim" in parts:
        for name, slots in state.optim.items():
            flat.update({f"optim/{name}/{key}": tensor for key, tensor in slots.items()})
    return flat
