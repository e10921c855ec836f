"""Attention on a CPU by blocks of queries, each against only those keys that some query of the block can see.

A few batched matrix products per block: at training lengths several times faster on a CPU than the general fused
kernel. Scores of one block are held at a time and computed again in the backward pass, so memory grows with T, not T^2.
Query heads of one key-value head are stacked, so keys are never repeated. Compiled code sees one opaque operator.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention.spec import ATTENTION, AttentionForm, AttentionQuery, Layout, alibi_bias

BLOCK = 64


class BlockedAttention:
    """Whole sequences with anything that can be asked of attention, but the log-sum-exp."""

    name = "blocked"
    kind = "torch"

    def priority(self, query: AttentionQuery) -> int:
        # in fp32 the fused kernel is as fast, unless there are documents whose keys need not be looked at
        return 60 if query.dtype in (torch.bfloat16, torch.float16) or query.mode == "packed" else 45

    def supports(self, query: AttentionQuery) -> Literal[True] | str:
        if query.device != "cpu":
            return f"it is made for CPUs, not {query.device}"
        if query.mode == "positions":
            return "it serves whole sequences, not keys of a decode state"
        if query.form.n_persistent:
            return "it has no persistent keys"
        if query.lse:
            return "it returns no log-sum-exp"
        return True

    def prepare(self, layout: Layout, form: AttentionForm, dtype: torch.dtype) -> dict[str, Any]:
        """{"masks": additive mask [1 or B, 1 or H, rows, keys 0..end] of each block of queries, "lows": [n_blocks] the
        first key that matters to each block}. Shapes depend on T alone, not on where documents begin."""
        length = layout.positions.shape[1]
        starts = _document_starts(layout)
        square = _causal_mask(length, dtype, layout.positions.device)
        masks, lows = [], []
        for first in range(0, length, BLOCK):
            end = min(first + BLOCK, length)
            low = starts[first]
            if form.window is not None and not form.n_sinks:
                low = max(low, first - form.window + 1)
            lows.append(low)
            if layout.documents is None and form.window is None:
                mask = square[BLOCK - (end - first) :, square.shape[1] - end :][None, None]
            else:
                mask = _mask(layout, form, first, end, dtype)
            if form.slopes is not None:
                index = _index(end, layout)[None]
                bias = alibi_bias(Layout(index[:, first:], k_positions=index), form.slopes, torch.float64)
                mask = mask + bias.to(dtype)
            masks.append(mask)
        return {"masks": masks, "lows": torch.tensor(lows, device="cpu")}

    def run(self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, prepared: dict[str, Any]) -> Tensor:
        """o [B, T, H, Dv]."""
        softcap = form.softcap or 0.0
        run = _op if torch.compiler.is_compiling() or _is_fake() else _Blocked.apply
        return run(q, k, v, prepared["masks"], prepared["lows"], form.scale, softcap)


def _is_fake() -> bool:
    """Whether tensors have shapes but no data now, as in an estimate; the bounds of blocks cannot be read then."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _index(length: int, layout: Layout) -> Tensor:
    return torch.arange(length, device=layout.positions.device)


def _document_starts(layout: Layout) -> list[int]:
    """Per query index the first key index of its document, the smallest over rows."""
    length = layout.positions.shape[1]
    if layout.documents is None:
        return [0] * length
    return (_index(length, layout) - layout.positions).clamp_min(0).amin(0).tolist()


def _causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[BLOCK, T or more]: zeros, and a causal corner in the last BLOCK columns; blocks take slices from its right."""
    width = max(BLOCK, length)
    mask = torch.zeros(BLOCK, width, dtype=dtype, device=device)
    corner = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=device).triu(1)
    mask[:, width - BLOCK :].masked_fill_(corner, float("-inf"))
    return mask


def _mask(layout: Layout, form: AttentionForm, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """[1 or B, 1, rows, end]: zero where the key is visible, else minus infinity."""
    keys = _index(end, layout)
    rows = keys[first:, None]
    seen = (rows >= keys)[None]
    if layout.documents is not None:
        seen = seen & (layout.documents[:, first:end, None] == layout.documents[:, None, :end])
    if form.window is not None:
        near = (rows - keys < form.window)[None]
        seen = seen & (near | (layout.positions[:, None, :end] < form.n_sinks) if form.n_sinks else near)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]


def _tiled(mask: Tensor, low: int, batch: int, n_kv_heads: int, groups: int) -> Tensor:
    """[1 or B * Hkv, G * rows, keys] of a block's mask, as the stacked scores want it."""
    mask = mask[..., low:]
    rows, keys = mask.shape[-2:]
    if mask.shape[:2] == (1, 1):
        return mask.expand(1, groups, rows, keys).reshape(1, groups * rows, keys)
    return mask.expand(batch, n_kv_heads * groups, rows, keys).reshape(batch * n_kv_heads, groups * rows, keys)


def _stack(x: Tensor, n_kv_heads: int) -> Tensor:
    """[B, T, Hkv * G, D] -> [B * Hkv, G, T, D]."""
    batch, length, heads, width = x.shape
    x = x.reshape(batch, length, n_kv_heads, heads // n_kv_heads, width).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * n_kv_heads, heads // n_kv_heads, length, width)


def _unstack(x: Tensor, batch: int) -> Tensor:
    """[B * Hkv, G, T, D] -> [B, T, Hkv * G, D]."""
    rows, groups, length, width = x.shape
    return x.view(batch, rows // batch * groups, length, width).transpose(1, 2)


def _weights(qb: Tensor, k_t: Tensor, mask: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Attention weights of stacked queries qb [R, G * rows, D] on k_t [R, D, keys]; tanh(score / cap) where capped."""
    if not softcap:
        return torch.softmax(torch.baddbmm(mask, qb, k_t, alpha=scale), -1), None
    bent = torch.bmm(qb, k_t).mul_(scale / softcap).tanh_()
    return torch.softmax(mask + bent * softcap, -1), bent


def _forward(
    q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], lows: Tensor, scale: float, softcap: float
) -> Tensor:
    batch, length = q.shape[:2]
    n_kv_heads = k.shape[2]
    groups = q.shape[2] // n_kv_heads
    qs, vs = _stack(q, n_kv_heads), _stack(v, n_kv_heads)[:, 0]
    k_t = k.permute(0, 2, 3, 1).reshape(batch * n_kv_heads, k.shape[3], length)
    out = q.new_empty(batch * n_kv_heads, groups, length, v.shape[3])
    first = 0
    for mask, low in zip(masks, lows.tolist()):
        end = mask.shape[-1]
        qb = qs[:, :, first:end].flatten(1, 2)
        weights, _ = _weights(qb, k_t[:, :, low:end], _tiled(mask, low, batch, n_kv_heads, groups), scale, softcap)
        out[:, :, first:end] = torch.bmm(weights, vs[:, low:end]).unflatten(1, (groups, -1))
        first = end
    return _unstack(out, batch)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], lows: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = q.shape[:2]
    n_kv_heads = k.shape[2]
    groups = q.shape[2] // n_kv_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    qs, ks, grads = _stack(q, n_kv_heads), _stack(k, n_kv_heads)[:, 0], _stack(grad, n_kv_heads)
    k_t = ks.transpose(1, 2).contiguous()
    v_t = v.permute(0, 2, 3, 1).reshape(batch * n_kv_heads, v.shape[3], length)
    dq = torch.empty_like(qs, memory_format=torch.contiguous_format)
    dk = torch.zeros(ks.shape, dtype=wide, device=q.device)
    dv = torch.zeros(ks.shape[:2] + v.shape[3:], dtype=wide, device=q.device)
    first = 0
    for mask, low in zip(masks, lows.tolist()):
        end = mask.shape[-1]
        qb, db = qs[:, :, first:end].flatten(1, 2), grads[:, :, first:end].flatten(1, 2)
        weights, bent = _weights(qb, k_t[:, :, low:end], _tiled(mask, low, batch, n_kv_heads, groups), scale, softcap)
        dv[:, low:end].add_(torch.bmm(weights.transpose(1, 2), db))
        d_weights = torch.bmm(db, v_t[:, :, low:end])
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        if bent is not None:
            d_scores.mul_(1 - bent.square_())
        dq[:, :, first:end] = torch.bmm(d_scores, ks[:, low:end]).unflatten(1, (groups, -1))
        dk[:, low:end].add_(torch.bmm(d_scores.transpose(1, 2), qb))
        first = end
    dk, dv = (_unstack(x[:, None].to(q.dtype), batch) for x in (dk.mul_(scale), dv))
    return _unstack(dq.mul_(scale), batch), dk, dv


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], lows: Tensor, scale: float, softcap: float
    ) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        ctx.rest = (masks, lows, scale, softcap)
        return _forward(q, k, v, masks, lows, scale, softcap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None)


@torch.library.custom_op("manyformer::blocked_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], lows: Tensor, scale: float, softcap: float) -> Tensor:
    return _forward(q, k, v, masks, lows, scale, softcap).contiguous()


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], lows: Tensor, scale: float, softcap: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("manyformer::blocked_attention_backward", mutates_args=())
def _op_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], lows: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward(grad, q, k, v, masks, lows, scale, softcap)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_op_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], lows: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, masks, lows, scale, softcap = inputs
    ctx.n_masks = len(masks)
    ctx.save_for_backward(q, k, v, lows, *masks)
    ctx.rest = (scale, softcap)


def _op_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, lows, *masks = ctx.saved_tensors
    return (*_op_backward(grad, q, k, v, masks, lows, *ctx.rest), [None] * ctx.n_masks, None, None, None)


_op.register_autograd(_op_gradients, setup_context=_save)

BLOCKED = ATTENTION.add(BlockedAttention())
