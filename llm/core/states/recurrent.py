"""States of short convolutions and of recurrences, which must remember enough to undo what they have folded in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Literal

import torch
from torch import Tensor

from llm.core.states.base import DecodeState, fetch, own_copy, spread, take_along

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Policy = Literal["copies", "replay"]
Update = Callable[[Tensors, Tensors, Tensor], Tensors]
"""(state {name: [B, ...]}, factors {name: [B, N, ...]}, counts [B]) -> the state after the first counts[b] of the N
tokens whose factors are given. It must not write into what it is given."""


class ConvState(DecodeState):
    """The last inputs of a causal convolution of `width` taps: x [B, width - 1 + n_tentative, C], oldest first."""

    def __init__(
        self,
        batch: int,
        width: int,
        channels: int,
        *,
        n_tentative: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, device=device, max_tentative=n_tentative)
        assert width >= 1 and n_tentative >= 0
        self.n_past = width - 1
        self.x = torch.zeros(batch, self.n_past + n_tentative, channels, dtype=dtype, device=device)

    def append(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Write x [B, T, C]; of row b only the first counts[b] tokens are real.

        Returns [B, width - 1 + T, C], the inputs before the chunk (zeros before the start) and the chunk: an unpadded
        convolution over it gives the chunk's T outputs.
        """
        n_new = x.shape[1]
        counts = self._counts(n_new, counts)
        joined = torch.cat([self.x, x.to(self.x.dtype)], dim=1)
        n_slots = self.x.shape[1]
        history = joined[:, n_slots - self.n_past :]
        self.x = take_along(joined, counts[:, None] + torch.arange(n_slots, device=x.device))
        self.advance(counts)
        return history

    def export(self) -> dict[str, Tensor]:
        assert self.n_tentative is None, "commit or abort before an export"
        return {"length": self.length.clone(), "x": own_copy(self.x[:, self.x.shape[1] - self.n_past :])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._restore_length(tensors)
        stored = fetch(tensors, "x", (self.n_past, self.x.shape[2])).to(self.x)
        spare = self.x.new_zeros(self.batch, self.x.shape[1] - self.n_past, self.x.shape[2])
        self.x = torch.cat([spare, stored], dim=1)

    def _rollback(self, accepted: Tensor) -> None:
        index = torch.arange(self.x.shape[1], device=self.x.device) - (self.written - accepted)[:, None]
        self.x = torch.where((index >= 0)[..., None], take_along(self.x, index.clamp(min=0)), 0)

    def _rows(self) -> dict[str, Tensor]:
        return {"x": self.x}


class RecurrentState(DecodeState):
    """Tensors that every token changes: `shapes` {name: shape}, each held as [B, *shape].

    policy "copies" keeps the state after each tentative token (n_tentative more states). policy "replay" keeps the
    state from before the transaction, the newest one, and each tentative token's `factors` {name: shape} (keys, values,
    gates, ...), to which `update` is applied again for the accepted ones. `choose_policy` compares their bytes.

    A mixer reads with `read`, computes, and calls `write` with what `wants` asks for.
    """

    def __init__(
        self,
        batch: int,
        shapes: Shapes,
        *,
        n_tentative: int = 0,
        policy: Policy = "copies",
        factors: Shapes | None = None,
        update: Update | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, device=device, max_tentative=n_tentative)
        assert shapes and "length" not in shapes, "a recurrent state needs named tensors, none of them called 'length'"
        assert policy == "copies" or (factors and update is not None), "replay needs factors and an update function"
        self.policy = policy
        self.update = update

        def zeros(of: Shapes, *lead: int) -> Tensors:
            return {name: torch.zeros(batch, *lead, *shape, dtype=dtype, device=device) for name, shape in of.items()}

        spare = shapes if n_tentative else {}
        self.committed = zeros(shapes)
        self.copies = zeros(spare, n_tentative) if policy == "copies" else {}
        self.newest = zeros(spare) if policy == "replay" else {}
        self.factors = zeros((factors or {}) if n_tentative else {}, n_tentative) if policy == "replay" else {}

    @property
    def wants(self) -> Literal["final", "each", "factors"]:
        """What `write` needs besides the final state now: nothing, the state after each token, or their factors."""
        if self.n_tentative is None:
            return "final"
        return "each" if self.policy == "copies" else "factors"

    def read(self) -> Tensors:
        """{name: [B, *shape]} after all tokens written so far. Not to be written into."""
        if self.n_tentative is None:
            return dict(self.committed)
        return self._state_after(self.written) if self.policy == "copies" else dict(self.newest)

    def write(
        self,
        final: Tensors,
        counts: Tensor,
        *,
        each: Tensors | None = None,
        factors: Tensors | None = None,
    ) -> None:
        """Put the state after counts[b] [B] more tokens.

        final {name: [B, *shape]}: after the last real token of each row.
        each {name: [B, T, *shape]}: after each token, when `wants` is "each".
        factors {name: [B, T, *shape]}: of each token, when `wants` is "factors".
        """
        counts = counts.to(self.length)
        if self.wants == "final":
            self.committed = {name: final[name].to(old.dtype) for name, old in self.committed.items()}
        elif self.wants == "each":
            assert each is not None, "inside a transaction this state wants the state after each token"
            self.copies = {name: _place(old, each[name], self.written, counts) for name, old in self.copies.items()}
        else:
            assert factors is not None, "inside a transaction this state wants each token's factors"
            self.newest = {name: final[name].to(old.dtype) for name, old in self.newest.items()}
            self.factors = {
                name: _place(old, factors[name], self.written, counts) for name, old in self.factors.items()
            }
        self.advance(counts)

    def begin(self, n: int) -> None:
        super().begin(n)
        if self.policy == "replay" and self.newest:
            self.newest = dict(self.committed)

    def export(self) -> dict[str, Tensor]:
        assert self.n_tentative is None, "commit or abort before an export"
        return {"length": self.length.clone(), **{name: own_copy(tensor) for name, tensor in self.committed.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._restore_length(tensors)
        for name, old in self.committed.items():
            self.committed[name] = own_copy(fetch(tensors, name, tuple(old.shape[1:])).to(old))
        for group in (self.copies, self.newest, self.factors):
            for name, old in group.items():
                group[name] = old.new_zeros(self.batch, *old.shape[1:])

    def _state_after(self, count: Tensor) -> Tensors:
        """The state after the first count[b] tentative tokens, from the copies."""
        index = (count - 1).clamp(min=0)[:, None]
        after = {}
        for name, old in self.committed.items():
            kept = self.copies.get(name)
            if kept is None or kept.shape[1] == 0:
                after[name] = old
            else:
                after[name] = torch.where(spread(count > 0, old), take_along(kept, index)[:, 0], old)
        return after

    def _rollback(self, accepted: Tensor) -> None:
        if self.policy == "copies":
            self.committed = self._state_after(accepted)
        elif self.factors:
            assert self.update is not None
            replayed = self.update(dict(self.committed), dict(self.factors), accepted)
            self.committed = {name: replayed[name].to(old.dtype) for name, old in self.committed.items()}

    def _groups(self) -> dict[str, Tensors]:
        return {"committed": self.committed, "copies": self.copies, "newest": self.newest, "factors": self.factors}

    def _rows(self) -> dict[str, Tensor]:
        return {f"{group}/{name}": t for group, tensors in self._groups().items() for name, t in tensors.items()}

    def _set_row(self, name: str, tensor: Tensor) -> None:
        group, _, key = name.partition("/")
        self._groups()[group][key] = tensor


def choose_policy(shapes: Shapes, factors: Shapes, n_tentative: int) -> Policy:
    """The policy that holds fewer bytes per row for transactions of n_tentative tokens; copies when they are equal."""
    state = sum(prod(shape) for shape in shapes.values())
    per_token = sum(prod(shape) for shape in factors.values())
    return "copies" if n_tentative * state <= state + n_tentative * per_token else "replay"


def _place(buffer: Tensor, chunk: Tensor, start: Tensor, counts: Tensor) -> Tensor:
    """buffer [B, N, ...] with chunk[b, :counts[b]] put at start[b] and on."""
    index = torch.arange(buffer.shape[1], device=buffer.device) - start[:, None]
    fresh = (index >= 0) & (index < counts[:, None])
    taken = take_along(chunk.to(buffer.dtype), index.clamp(0, chunk.shape[1] - 1))
    return torch.where(spread(fresh, buffer), taken, buffer)
