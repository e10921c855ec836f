"""The protocol of decode states, and the two kinds that hold no tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm.core.errors import UserError

if TYPE_CHECKING:
    from llm.core.seq import SeqInfo


class DecodeState:
    """Base of every state. B rows, each with its own length.

    length: [B] int64 committed tokens.
    written: [B] int64 tentative tokens of the open transaction (zeros when none is open).
    n_tentative: the n of the open transaction, None when none is open.
    max_tentative: the largest n that `begin` takes; None: any.
    """

    def __init__(self, batch: int, *, device: torch.device | str = "cpu", max_tentative: int | None = None) -> None:
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.written = torch.zeros_like(self.length)
        self.n_tentative: int | None = None
        self.max_tentative = max_tentative

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.length.shape[0]

    def end(self) -> Tensor:
        """[B] position of the next token to be written: committed plus tentative ones."""
        return self.length + self.written

    def begin(self, n: int) -> None:
        """Open a transaction of at most n tentative tokens; one that is open already is our bug."""
        assert self.n_tentative is None, "a transaction is open already"
        assert n >= 0, f"a transaction of {n} tokens"
        limit = self.max_tentative
        assert limit is None or n <= limit, f"a transaction of {n} tokens in a state made for {limit}: see new_state"
        self.n_tentative = n
        self.written = torch.zeros_like(self.length)

    def commit(self, accepted: Tensor) -> None:
        """Keep the first accepted[b] tentative tokens of each row ([B] int64, 0..written) and close the transaction."""
        assert self.n_tentative is not None, "no transaction is open"
        accepted = accepted.to(self.length)
        if _may_look(accepted):
            fits = bool(((accepted >= 0) & (accepted <= self.written)).all())
            assert fits, f"commit of {accepted.tolist()} where {self.written.tolist()} were written"
        self._rollback(accepted)
        self.length = self.length + accepted
        self.written = torch.zeros_like(self.length)
        self.n_tentative = None

    def abort(self) -> None:
        """Forget all tentative tokens and close the transaction."""
        self.commit(torch.zeros_like(self.length))

    def advance(self, counts: Tensor) -> None:
        """Called by a subclass after writing counts[b] tokens: they count as tentative inside a transaction."""
        if self.n_tentative is None:
            self.length = self.length + counts
            return
        self.written = self.written + counts
        if _may_look(counts):
            fits = bool((self.written <= self.n_tentative).all())
            assert fits, f"{self.written.tolist()} tokens written in a transaction of {self.n_tentative}"

    def reserve(self, n_new: int) -> None:
        """Make room for n_new more tokens of each row, so that compiled code which writes them need not."""

    def reorder(self, index: Tensor) -> None:
        """Row b becomes a copy of old row index[b] ([B'] int64); also grows or shrinks the batch, also when open."""
        self.length = self.length[index]
        self.written = self.written[index]
        for name, tensor in self._rows().items():
            self._set_row(name, tensor[index])

    def adopt(self, rows: Tensor, other: DecodeState) -> None:
        """Rows b with rows[b] ([B] bool) become those of `other`, which was made with the same arguments. With a fresh
        one, they start anew. Outside of transactions only."""
        assert self.n_tentative is None and other.n_tentative is None, "commit or abort before taking rows"
        self.length = torch.where(rows, other.length, self.length)
        theirs = other._rows()
        for name, tensor in self._rows().items():
            self._set_row(name, torch.where(spread(rows, tensor), theirs[name], tensor))

    def extend(self, other: DecodeState) -> None:
        """Put the rows of `other`, which was made with the same arguments, behind those that are there. Outside of
        transactions only; `other` is used up."""
        n_old = self.batch
        place = torch.arange(n_old + other.batch, device=self.length.device)
        is_new = place >= n_old
        other.reorder(torch.where(is_new, place - n_old, 0))
        self.reorder(torch.where(is_new, 0, place))
        self.adopt(is_new, other)

    def release(self) -> None:
        """Give back what is held together with other states; this one is used up."""

    def nbytes(self) -> int:
        """Bytes of the tensors of full rows, the two counters not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._rows().values())

    def held_bytes(self) -> int:
        """Bytes held now."""
        return self.nbytes()

    def export(self) -> dict[str, Tensor]:
        """Committed contents by name, for a prompt cache on disk; `restore` reads them back.

        Contiguous copies, which do not depend on the capacity nor on `max_tentative`.
        """
        assert self.n_tentative is None, "commit or abort before an export"
        return {"length": self.length.clone(), **{name: own_copy(t) for name, t in self._rows().items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the contents of an `export`, whose batch becomes this state's; UserError when they do not fit."""
        self._restore_length(tensors)
        for name, tensor in self._rows().items():
            self._set_row(name, own_copy(fetch(tensors, name, tuple(tensor.shape[1:])).to(tensor)))

    def _restore_length(self, tensors: Mapping[str, Tensor]) -> None:
        assert self.n_tentative is None, "commit or abort before a restore"
        self.length = own_copy(fetch(tensors, "length", ()).to(self.length))
        self.written = torch.zeros_like(self.length)

    def _rollback(self, accepted: Tensor) -> None:
        """Make the contents those after `accepted` of the tentative tokens; `length` is still the old one."""

    def _rows(self) -> dict[str, Tensor]:
        """Tensors whose first dimension is the row, by name."""
        return {}

    def _set_row(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor of `_rows`."""
        setattr(self, name, tensor)

    def _counts(self, n_new: int, counts: Tensor | None) -> Tensor:
        """[B] how many of n_new tokens are real."""
        return torch.full_like(self.length, n_new) if counts is None else counts.to(self.length)


class EmptyState(DecodeState):
    """State of a part that remembers nothing but how far it has come; whoever owns it calls `advance`."""


class CompositeState(DecodeState):
    """States by key (layer, or (loop, layer)), moved together. All parts have seen the same tokens."""

    def __init__(self, parts: Mapping[str, DecodeState]) -> None:
        self.parts = dict(parts)
        assert self.parts, "a composite state needs at least one part"

    def _first(self) -> DecodeState:
        return next(iter(self.parts.values()))

    @property
    def length(self) -> Tensor:  # type: ignore[override]
        return self._first().length

    @property
    def written(self) -> Tensor:  # type: ignore[override]
        return self._first().written

    @property
    def n_tentative(self) -> int | None:  # type: ignore[override]
        return self._first().n_tentative

    @property
    def max_tentative(self) -> int | None:  # type: ignore[override]
        limits = [part.max_tentative for part in self.parts.values() if part.max_tentative is not None]
        return min(limits, default=None)

    def __getitem__(self, key: str) -> DecodeState:
        return self.parts[key]

    def begin(self, n: int) -> None:
        for part in self.parts.values():
            part.begin(n)

    def commit(self, accepted: Tensor) -> None:
        for part in self.parts.values():
            part.commit(accepted)

    def abort(self) -> None:
        for part in self.parts.values():
            part.abort()

    def advance(self, counts: Tensor) -> None:
        for part in self.parts.values():
            part.advance(counts)

    def reserve(self, n_new: int) -> None:
        for part in self.parts.values():
            part.reserve(n_new)

    def reorder(self, index: Tensor) -> None:
        for part in self.parts.values():
            part.reorder(index)

    def adopt(self, rows: Tensor, other: DecodeState) -> None:
        assert isinstance(other, CompositeState)
        for key, part in self.parts.items():
            part.adopt(rows, other.parts[key])

    def extend(self, other: DecodeState) -> None:
        assert isinstance(other, CompositeState)
        for key, part in self.parts.items():
            part.extend(other.parts[key])

    def release(self) -> None:
        for part in self.parts.values():
            part.release()

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts.values())

    def held_bytes(self) -> int:
        return sum(part.held_bytes() for part in self.parts.values())

    def export(self) -> dict[str, Tensor]:
        return {f"{key}/{name}": tensor for key, part in self.parts.items() for name, tensor in part.export().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for key, part in self.parts.items():
            head = f"{key}/"
            part.restore({name[len(head) :]: value for name, value in tensors.items() if name.startswith(head)})


def valid_counts(seq: SeqInfo) -> Tensor | None:
    """[B] number of real tokens per row of a ragged prefill, or None when all are real."""
    return None if seq.valid is None else seq.valid.sum(dim=1)


def own_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy that shares no memory, as safetensors wants it."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def fetch(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor [B, *shape] of an exported state, or UserError."""
    if name not in tensors:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise UserError(f"the stored state has no {name!r} (it has: {held}); it comes from another model")
    found = tensors[name]
    if tuple(found.shape[1:]) != shape:
        raise UserError(
            f"the stored state's {name!r} has {tuple(found.shape[1:])} per row, this model needs {shape}; "
            "it comes from another model"
        )
    return found


def spread(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` with trailing dimensions of 1, so that it broadcasts against `like`."""
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))


def take_along(source: Tensor, index: Tensor) -> Tensor:
    """source [B, S, ...], index [B, N] -> [B, N, ...]: row b's entries at index[b]."""
    return torch.take_along_dim(source, spread(index, source), dim=1)


def _may_look(tensor: Tensor) -> bool:
    """Whether looking at values costs nothing: on an accelerator it would wait for the device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
