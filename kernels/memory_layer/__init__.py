"""Memory Layer (Ding et al. 2024): rows of tables, addressed by the signs of the input and summed with weights.

Legend: N tokens, K tables, R = 2^n_bits rows of a table, D outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.memory_layer import gather, reference, triton_gather  # noqa: F401
from kernels.memory_layer.hashing import hash_codes, hash_weights
from kernels.memory_layer.spec import MEMORY_LOOKUP, MemoryLookupQuery

__all__ = ["MEMORY_LOOKUP", "MemoryLookupQuery", "hash_codes", "hash_weights", "lookup_query", "memory_lookup"]


def memory_lookup(tables: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """y [..., D] = sum over k of weights[..., k] * tables[k, codes[..., k]], in the dtype of the weights.

    tables [K, R, D], codes [..., K] int64 in 0..R-1, weights [..., K] of at least the precision of the tables. Only the
    addressed rows get a gradient.
    """
    shape = codes.shape[:-1]
    flat = _lookup(tables, codes.reshape(-1, codes.shape[-1]), weights.reshape(-1, codes.shape[-1]))
    return flat.view(*shape, tables.shape[-1])


def lookup_query(device: torch.device, dtype: torch.dtype) -> MemoryLookupQuery:
    """What a look-up in tables of `dtype` asks for under the current settings."""
    return MemoryLookupQuery(device.type, dtype, torch.are_deterministic_algorithms_enabled())


def _implementation(tables: Tensor) -> Any:
    return dispatch.resolve("memory_layer", lookup_query(tables.device, tables.dtype))


@torch.library.custom_op("manyformer::memory_lookup", mutates_args=())
def _lookup(tables: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    return _implementation(tables).forward(tables, codes, weights)


@_lookup.register_fake
def _(tables: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(codes.shape[0], tables.shape[-1])


@torch.library.custom_op("manyformer::memory_lookup_backward", mutates_args=())
def _lookup_backward(grad: Tensor, tables: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return _implementation(tables).backward(grad.contiguous(), tables, codes, weights)


@_lookup_backward.register_fake
def _(grad: Tensor, tables: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tables), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    d_tables, d_weights = _lookup_backward(grad, *ctx.saved_tensors)
    return d_tables, None, d_weights


_lookup.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.manyformer.memory_lookup)
def _flops(tables: Any, codes: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A multiply-add for every output of every addressed row."""
    return 2 * codes[0] * codes[1] * tables[2]


@register_flop_formula(torch.ops.manyformer.memory_lookup_backward)
def _backward_flops(grad: Any, tables: Any, codes: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 4 * codes[0] * codes[1] * tables[2]
