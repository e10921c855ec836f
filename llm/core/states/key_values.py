"""What the states that keep the key and value of every token have in common, wherever they keep them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.states.base import DecodeState, fetch, own_copy, spread


class KeyValueState(DecodeState):
    """Append-only keys and values. Rolling back only moves the length.

    capacity: most tokens of a row, tentative ones included. extent: host bound on max(end()), what must be read.
    arrangement: states of which it is the same, and that have read the same, give it at the same places.
    """

    def __init__(self, batch: int, capacity: int, *, device: torch.device | str) -> None:
        super().__init__(batch, device=device)
        self.capacity = capacity
        self.arrangement = f"all of {capacity}"
        self.extent = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys."""
        return self._storage()["k"].dtype

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v [B, T, Hkv, D] behind each row's end; of row b only the first counts[b] tokens are real.

        Returns (k [B, S, Hkv, D], v, positions [B, S] int64): everything that may be seen; a query at position p may
        see the entries with 0 <= position <= p.
        """
        self._write(k, v, counts)
        places = self._seen_places()
        seen = self._contents(places.shape[0])
        return seen["k"], seen["v"], places.expand(self.batch, -1)

    def read(self) -> tuple[Tensor, Tensor]:
        """(k, v) [B, extent, Hkv, D]; what stands behind a row's end means nothing, but is finite."""
        seen = self._contents(self.extent)
        return seen["k"], seen["v"]

    def full(self, n_queries: int) -> bool:
        """Whether the newest n_queries tokens see all that `append` has just given, as far as the host knows."""
        on_cpu = self.length.device.type == "cpu" and not torch.compiler.is_compiling()
        return n_queries == 1 and self.batch == 1 and on_cpu

    def nbytes(self) -> int:
        return self.batch * self.capacity * self._token_bytes()

    def export(self) -> dict[str, Tensor]:
        assert self.n_tentative is None, "commit or abort before an export"
        extent = int(self.length.max())
        real = torch.arange(extent, device=self.length.device) < self.length[:, None]
        parts = {name: torch.where(spread(real, t), t, 0) for name, t in self._contents(extent).items()}
        return {"length": self.length.clone(), **{name: own_copy(part) for name, part in parts.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._restore_length(tensors)
        self.extent = int(self.length.max())
        if self.extent > self.capacity:
            raise UserError(
                f"the stored state holds {self.extent} tokens, this one has room for {self.capacity}; "
                "raise the capacity"
            )
        contents = {}
        for name, tensor in self._storage().items():
            stored = tensors.get(name)
            shape = (self.extent if stored is None else stored.shape[1], *tensor.shape[2:])
            contents[name] = fetch(tensors, name, shape)[:, : self.extent].to(tensor)
        self._refill(contents)

    def _seen_places(self) -> Tensor:
        """[S] positions of what `append` gives."""
        return torch.arange(self.extent, device=self.length.device)

    def _token_bytes(self) -> int:
        """Of one token of one row."""
        return sum(prod(tensor.shape[2:]) * tensor.element_size() for tensor in self._storage().values())

    def _storage(self) -> dict[str, Tensor]:
        """Tensors by name that hold the tokens; what comes behind their first two dimensions is one token's."""
        raise NotImplementedError

    def _contents(self, n: int) -> dict[str, Tensor]:
        """The first n tokens of each row by name, [B, n, ...]; anything stands behind a row's end."""
        raise NotImplementedError

    def _write(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        """Put the tokens of `append` into the storage, `advance`, and raise `extent`."""
        raise NotImplementedError

    def _refill(self, contents: dict[str, Tensor]) -> None:
        """Hold these tokens [B, extent, ...] by name instead of what is there; `length` is theirs already."""
        raise NotImplementedError
