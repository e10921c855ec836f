"""Copies of weights in the layout of oneDNN, for products with a few rows on a CPU.

A weight that is used for one row is bounded by memory, for hundreds of rows by arithmetic. Between the two, as when
several drafted tokens are checked or several requests take a step, BLAS needs several times as long for 9 rows as for
one; with a weight that has been laid out in tiles, which only pays where it is used again and again, they cost little
more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm.core.compat import pack_weight, packed_linear, packs_weights

FEWEST_ROWS, MOST_ROWS = 4, 32
"""Below and above this an ordinary product is as fast."""
LEAST_NUMBERS = 2**19
"""Smaller weights stay in the cache, where the layout makes no difference."""


class Packed:
    """A weight's copy, made when it is first needed and again when the weight has changed."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.weight: Tensor | None = None
        self.key: tuple[tuple[int, int], ...] = ()
        # What the copy was made of, held so that no other tensor can come to lie at its address.
        self.sources: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Packed:
        return Packed()

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Tensor]) -> Tensor | None:
        """x [..., d_in] times a weight [d_out, d_in] in fp32, or None where the ordinary product is to be used. parts:
        the parameters that the weight is made of, whose changes are seen (but for those through `.data`)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            self._forget()
            return None
        n_rows = x.numel() // x.shape[-1]
        if not FEWEST_ROWS <= n_rows <= MOST_ROWS or weight.numel() < LEAST_NUMBERS or x.dtype != weight.dtype:
            return None
        key = tuple((part.data_ptr(), _version(part)) for part in parts)
        if self.weight is None or key != self.key:
            self.weight, self.key = pack_weight(weight, MOST_ROWS // 2), key
            self.sources = [part.detach() for part in parts]
        return packed_linear(x, self.weight, bias)


def _version(tensor: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode have no count."""
    return 0 if tensor.is_inference() else tensor._version


def let_pack(model: nn.Module) -> None:
    """For inference: weights of a model in fp32 on a CPU may be kept a second time, in the layout for a few rows. What
    is never used with a few rows is not copied."""
    if not packs_weights():
        return
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if hasattr(module, "packed") and weight.device.type == "cpu" and not hasattr(weight, "device_mesh"):
            module.packed = Packed()  # type: ignore[assignment]
