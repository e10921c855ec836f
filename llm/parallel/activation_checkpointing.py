"""Activation checkpointing per block: what is kept for the backward pass, and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["none", "selective", "full"]

KEPT = frozenset(
    {
        "aten.mm", "aten.addmm", "aten._scaled_mm", "higher_order.flex_attention",
        "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_fused_attention_overrideable", "manyformer.blocked_attention",
    }
)  # fmt: skip
"""Operators whose results selective checkpointing keeps: the products of linear layers and fused attention, costly to
compute again. Batched products are not among them, since those of unfused attention are as large as its scores."""


def checkpoint_blocks(model: nn.Module, mode: Mode, keep: frozenset[str] = frozenset()) -> None:
    """Make each block compute its activations again in the backward pass, in place; no parameter changes its name.

    full: only the block's inputs are kept. selective: also the results of `KEPT` and of `keep`, operator names
    such as "aten.mm" or "manyformer.scan". Random numbers (dropout) are the same both times.
    """
    if mode == "none":
        return
    context: Callable[[], Any] | None = None
    if mode == "selective":
        context = partial(create_selective_checkpoint_contexts, _policy(KEPT | keep))
    for _, block in model.blocks():  # type: ignore[operator]
        block.forward = _checkpointed(block.forward, context)


def _checkpointed(forward: Callable[..., Any], context: Callable[[], Any] | None) -> Callable[..., Any]:
    options: dict[str, Any] = {} if context is None else {"context_fn": context}

    def run(x: torch.Tensor, seq: Any, state: Any = None) -> Any:
        if state is not None or not torch.is_grad_enabled():
            return forward(x, seq, state)
        return checkpoint(forward, x, seq, use_reentrant=False, **options)

    return run


def _policy(keep: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if _op_name(op) in keep else CheckpointPolicy.PREFER_RECOMPUTE

    return decide


def _op_name(op: Any) -> str:
    """ "aten.mm" of an operator, "higher_order.flex_attention" of one that takes functions."""
    if isinstance(op, torch._ops.OpOverload):
        return op._schema.name.replace("::", ".")
    return f"higher_order.{op}"
