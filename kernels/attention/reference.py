"""Attention in plain PyTorch: every score is held, softmax in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention.spec import ATTENTION, AttentionForm, AttentionQuery, Layout, alibi_bias, visible


class ReferenceAttention:
    """Does everything that can be asked."""

    name = "reference"
    kind = "reference"

    def priority(self, query: AttentionQuery) -> int:
        return 0

    def supports(self, query: AttentionQuery) -> Literal[True] | str:
        return True

    def prepare(self, layout: Layout, form: AttentionForm, dtype: torch.dtype) -> dict[str, Any]:
        """What layers of the same form share in one forward: the mask and the bias."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bias = None if form.slopes is None else alibi_bias(layout, form.slopes, wide, form.n_persistent)
        return {"mask": visible(layout, form)[:, None], "bias": bias}

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, prepared: dict[str, Any], lse: bool = False
    ) -> Any:
        """o [B, T, H, Dv] in the dtype of q, and with `lse` also the log-sum-exp of the scores [B, T, H] in fp32."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        groups = form.n_heads // form.n_kv_heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k.to(wide)) * form.scale
            if form.softcap is not None:
                scores = form.softcap * torch.tanh(scores / form.softcap)
            if prepared["bias"] is not None:
                scores = scores + prepared["bias"].to(wide)
            mask = prepared["mask"]
            scores = scores.masked_fill(~mask, float("-inf"))
            sees_any = mask.any(-1, keepdim=True)
            weights = torch.softmax(torch.where(sees_any, scores, 0.0), dim=-1)
            out = torch.einsum("bhts,bshd->bthd", weights, v.to(wide)).to(q.dtype)
            return (out, torch.logsumexp(scores, dim=-1).transpose(1, 2)) if lse else out


REFERENCE = ATTENTION.add(ReferenceAttention())
