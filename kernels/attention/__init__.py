"""Softmax attention: `attention(...)` for one call, or `dispatch.resolve("attention", query)` once and run many."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels import dispatch
from kernels.attention import blocked, flash, flex, reference, sdpa  # noqa: F401
from kernels.attention.spec import ATTENTION, AttentionForm, AttentionQuery, Layout, visible

__all__ = ["ATTENTION", "AttentionForm", "AttentionQuery", "Layout", "attention", "visible"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: AttentionForm,
    layout: Layout,
    *,
    lse: bool = False,
    backend: str | None = None,
) -> Any:
    """o [B, T, H, Dv] of q [B, T, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv]; with `lse` also [B, T, H] in fp32."""
    query = AttentionQuery(
        q.device.type, q.dtype, form, layout.mode, q.requires_grad or k.requires_grad or v.requires_grad, lse
    )
    impl = dispatch.resolve("attention", query, backend=backend)
    return impl.run(q, k, v, form, impl.prepare(layout, form, q.dtype), **({"lse": True} if lse else {}))
