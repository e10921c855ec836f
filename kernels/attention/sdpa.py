"""Attention through torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention.spec import ATTENTION, AttentionForm, AttentionQuery, Layout, alibi_bias, visible

_CUDA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class SDPAttention:
    """Causal without a mask where that is all; else one mask for all layers of the same form."""

    name = "sdpa"
    kind = "torch"

    def priority(self, query: AttentionQuery) -> int:
        return 50

    def supports(self, query: AttentionQuery) -> Literal[True] | str:
        if query.form.softcap is not None:
            return "scaled_dot_product_attention has no soft-cap"
        if query.lse:
            return "scaled_dot_product_attention returns no log-sum-exp"
        return True

    def prepare(self, layout: Layout, form: AttentionForm, dtype: torch.dtype) -> dict[str, Any]:
        """{"mask": [B or 1, 1 or H, T, S], bool or additive, or None, "causal": by index alone}."""
        if layout.full and form.slopes is None and form.window is None:
            return {"mask": None, "causal": False}
        if (
            layout.mode == "causal"
            and form.slopes is None
            and not form.n_persistent
            and (form.window is None or layout.positions.shape[1] <= form.window)
        ):
            return {"mask": None, "causal": True}
        mask = visible(layout, form)[:, None]
        if form.slopes is not None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            mask = alibi_bias(layout, form.slopes, wide, form.n_persistent).masked_fill(~mask, float("-inf")).to(dtype)
        return {"mask": mask, "causal": False}

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, prepared: dict[str, Any], lse: bool = False
    ) -> Tensor:
        """o [B, T, H, Dv]."""
        assert not lse, "supports() refuses a log-sum-exp"
        mask, causal = prepared["mask"], prepared["causal"]
        gqa = form.n_kv_heads != form.n_heads
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        if q.device.type == "cuda":
            with sdpa_kernel(_CUDA_ORDER, set_priority=True):
                out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=form.scale, enable_gqa=gqa)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=form.scale, enable_gqa=gqa)
        return out.transpose(1, 2)


SDPA = ATTENTION.add(SDPAttention())
