"""Counting live tensor memory by part, also of fake tensors: what a step would hold on a device that is not there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Follows every storage made by an operator inside the block until it is freed, and books it under `part`.

    live: bytes by part now. peak: the most held at one moment. at_peak: bytes by part at that moment.
    A view shares its base's storage and is counted once. Storages smaller than `grain` bytes take that much, as
    allocators do. What kernels use inside themselves is not seen.
    """

    def __init__(self, grain: int = 64) -> None:
        super().__init__()
        self.part = "activations"
        self.live: dict[str, int] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.ignored: frozenset[str] = frozenset()
        self.grain = grain
        self._total = 0
        self._known: dict[int, tuple[Any, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self.add(leaf, self.part)
        return out

    def add(self, tensor: Tensor, part: str) -> None:
        """Book a tensor's storage, unless it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or storage.nbytes() == 0:
            return
        size = -(-storage.nbytes() // self.grain) * self.grain
        self._known[key] = (weakref.finalize(storage, self._freed, key), part, size)
        self._change(part, size)

    def move(self, tensors: Iterable[Tensor], part: str) -> None:
        """Book tensors under another part from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._known:
                final, old, size = self._known[key]
                self._known[key] = (final, part, size)
                self._change(old, -size)
                self._change(part, size)
            else:
                self.add(tensor, part)

    def reset_peak(self, *ignored: str) -> None:
        """Begin to look for the peak anew, from now on without the parts `ignored`."""
        self.ignored = frozenset(ignored)
        self._total = sum(size for part, size in self.live.items() if part not in self.ignored)
        self.peak, self.at_peak = self._total, dict(self.live)

    def _freed(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self._change(part, -size)

    def _change(self, part: str, size: int) -> None:
        self.live[part] = self.live.get(part, 0) + size
        if part in self.ignored:
            return
        self._total += size
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self.live)

    def close(self) -> None:
        """Stop following; the figures stay."""
        for final, _, _ in self._known.values():
            final.detach()
        self._known.clear()


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def replace_tensors(module: torch.nn.Module, make: Callable[[Tensor], Tensor], *, buffers: bool = True) -> None:
    """Put `make(tensor)` in the place of each parameter and buffer; shared ones stay shared."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for name, param in list(part._parameters.items()):
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = torch.nn.Parameter(make(param.detach()), requires_grad=param.requires_grad)
                part._parameters[name] = made[id(param)]
        for name, buffer in list(part._buffers.items()) if buffers else ():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = make(buffer)
                part._buffers[name] = made[id(buffer)]
