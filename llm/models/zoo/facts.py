"""Facts: what is published of a named model, beside what is counted here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """params: trainable parameters as published (None: a shape of our own). source: the paper or report.

    hub: where the weights are. tolerance: relative, for figures that are published rounded or leave out norms.
    counts: further published integers by label, such as those of nested slices or of the layers without embeddings;
    count(config) -> the same labels as counted here. Those are compared within the same tolerance.
    note: what a reader of the table must know.
    """

    params: int | None
    source: str
    hub: str | None = None
    tolerance: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    count: Callable[[Any], dict[str, int]] | None = None
    note: str = ""

    def agrees(self, published: int, counted: int) -> bool:
        """Whether a count is the published one."""
        return abs(counted - published) <= self.tolerance * published


@dataclass(frozen=True)
class OtherModel:
    """A published model that is no decoder. build: the module on the meta device. kind: what it is, for the table."""

    build: Callable[[], Any]
    kind: str
    facts: Facts

    def counted(self) -> int:
        """Trainable parameters of the module."""
        return sum(p.numel() for p in self.build().parameters())
