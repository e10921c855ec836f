"""Attention through the flash-attn package, where it is installed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention.spec import ATTENTION, AttentionForm, AttentionQuery, Layout


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


class FlashAttention:
    """flash_attn_func for plain rows, flash_attn_varlen_func for packed documents."""

    name = "flash"
    kind = "package"

    def priority(self, query: AttentionQuery) -> int:
        return 70 if query.mode == "packed" else 45

    def supports(self, query: AttentionQuery) -> Literal[True] | str:
        if not _installed():
            return "the package flash-attn is not installed"
        if query.device != "cuda":
            return f"flash-attn needs CUDA, not {query.device}"
        if query.dtype not in (torch.float16, torch.bfloat16):
            return f"flash-attn takes fp16 and bf16, not {query.dtype}"
        if query.form.d_head > 256 or query.form.d_head % 8:
            return f"flash-attn takes d_head up to 256 in multiples of 8, not {query.form.d_head}"
        if query.form.n_sinks:
            return "flash-attn has no attention sinks"
        if query.mode == "positions":
            return "it serves whole sequences, not keys of a decode state"
        if query.form.n_persistent:
            return "it has no persistent keys"
        return True

    def prepare(self, layout: Layout, form: AttentionForm, dtype: torch.dtype) -> dict[str, Any]:
        """Offsets of packed documents and the slopes."""
        device = layout.positions.device
        slopes = None if form.slopes is None else torch.tensor(form.slopes, device=device, dtype=torch.float32)
        packed = layout.mode == "packed"
        assert not packed or layout.cu_seqlens is not None, "packed rows come with cu_seqlens"
        return {
            "cu_seqlens": layout.cu_seqlens if packed else None,
            "max_seqlen": layout.max_seqlen or layout.positions.shape[1],
            "slopes": slopes,
        }

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, prepared: dict[str, Any], lse: bool = False
    ) -> Any:
        """o [B, T, H, Dv], and with `lse` the log-sum-exp [B, T, H] in fp32."""
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        options: dict[str, Any] = {
            "causal": True,
            "softmax_scale": form.scale,
            "window_size": (-1, -1) if form.window is None else (form.window - 1, 0),
            "softcap": form.softcap or 0.0,
            "alibi_slopes": prepared["slopes"],
            "return_attn_probs": lse,
        }
        batch, length = q.shape[:2]
        offsets = prepared["cu_seqlens"]
        if offsets is None:
            found = flash_attn_func(q, k, v, **options)
            return (found[0], found[1].transpose(1, 2)) if lse else found
        longest = prepared["max_seqlen"]
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        found = flash_attn_varlen_func(*flat, offsets, offsets, longest, longest, **options)
        out = (found[0] if lse else found).unflatten(0, (batch, length))
        return (out, found[1].transpose(0, 1).unflatten(0, (batch, length))) if lse else out


FLASH = ATTENTION.add(FlashAttention())
