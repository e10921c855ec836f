"""Softmax attention: what is computed, what may be asked, and how an implementation is checked.

q [B, T, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv], H a multiple of Hkv; query head h reads key-value head
h // (H / Hkv). score = scale * q.k, then softcap * tanh(score / softcap), then - slope_h * (position of q - position of
k); softmax over the visible keys; o [B, T, H, Dv]. A query that sees no key (padding) has an unspecified finite output.

Visible, by index (training): the key stands in the same document at or before the query; by position (decoding): the
key's slot holds a token (position >= 0) at or before the query's position. With a window, further: less than `window`
positions back, or among the first `n_sinks` positions. The first `n_persistent` keys are no tokens: they stand in front
of those that the layout tells of, every query sees them, and slopes pass them by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import OpSpec, Tolerance, register_op

Mode = Literal["causal", "packed", "positions"]


@dataclass(frozen=True)
class AttentionForm:
    """What stays the same from call to call. slopes: ALiBi slope by head."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    scale: float
    window: int | None = None
    n_sinks: int = 0
    n_persistent: int = 0
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None

    def mask_key(self) -> str:
        """Equal for forms whose layers can share masks."""
        keys = f"{self.window}/{self.n_sinks}/{self.n_persistent}"
        return f"{keys}/{self.softcap}/{self.slopes}/{self.n_heads}/{self.n_kv_heads}"


@dataclass(frozen=True)
class AttentionQuery:
    """What is asked of an implementation. mode: causal (one document a row, by index), packed (several, by index),
    positions (decoding, keys of a state). grad: gradients will be wanted. lse: the log-sum-exp too."""

    device: str
    dtype: torch.dtype
    form: AttentionForm
    mode: Mode
    grad: bool = True
    lse: bool = False


@dataclass(frozen=True)
class Layout:
    """Where queries and keys stand in one forward; persistent keys are not counted here.

    positions: [B, T] of the queries. k_positions: [B, S] of the keys in mode "positions" (< 0 or beyond every query:
    an empty slot); None: keys belong to the same tokens as queries, by index. documents: [B, T] document index within
    the row, for packed rows. cu_seqlens, max_seqlen: the same as offsets into the flattened B*T tokens. full: by their
    positions all keys are visible to all queries (a window is another matter).
    """

    positions: Tensor
    k_positions: Tensor | None = None
    documents: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    full: bool = False

    @property
    def mode(self) -> Mode:
        """How visibility is told."""
        if self.k_positions is not None:
            return "positions"
        return "packed" if self.documents is not None else "causal"


def visible(layout: Layout, form: AttentionForm) -> Tensor:
    """[B or 1, T, S] bool: True where the query may see the key."""
    seen = _visible_tokens(layout, form.window, form.n_sinks)
    return F.pad(seen, (form.n_persistent, 0), value=True) if form.n_persistent else seen


def _visible_tokens(layout: Layout, window: int | None, n_sinks: int) -> Tensor:
    q_pos = layout.positions
    if layout.k_positions is not None:
        k_pos = layout.k_positions
        seen = (k_pos[:, None, :] >= 0) & (k_pos[:, None, :] <= q_pos[:, :, None])
    else:
        k_pos = q_pos
        index = torch.arange(q_pos.shape[1], device=q_pos.device)
        seen = (index[:, None] >= index)[None]
        if layout.documents is not None:
            seen = seen & (layout.documents[:, :, None] == layout.documents[:, None, :])
        elif window is not None and not n_sinks:
            return seen & (index[:, None] - index < window)[None]
    if window is not None:
        near = q_pos[:, :, None] - k_pos[:, None, :] < window
        seen = seen & (near | (k_pos[:, None, :] < n_sinks) if n_sinks else near)
    return seen


def alibi_bias(layout: Layout, slopes: tuple[float, ...], dtype: torch.dtype, n_persistent: int = 0) -> Tensor:
    """[B or 1, H, T, S]: -slope * distance, zero for persistent keys."""
    q_pos = layout.positions
    k_pos = q_pos if layout.k_positions is None else layout.k_positions
    distance = (q_pos[:, None, :, None] - k_pos[:, None, None, :]).to(dtype)
    if layout.mode == "causal":
        distance = distance[:1]
    bias = -torch.tensor(slopes, dtype=dtype, device=q_pos.device)[:, None, None] * distance
    return F.pad(bias, (n_persistent, 0)) if n_persistent else bias


def check_attention(impl: Any, query: AttentionQuery, device: torch.device) -> str | None:
    """Compare an implementation with the reference in fp64 on small inputs: outputs and, if asked for, gradients."""
    from kernels.attention.reference import REFERENCE

    form = query.form
    length = 150 if query.device == "cuda" else 67
    generator = torch.Generator().manual_seed(0)
    layout = sample_layout(query.mode, length, device)
    n_keys = form.n_persistent + (length if layout.k_positions is None else layout.k_positions.shape[1])
    shapes = ((length, form.n_heads), (n_keys, form.n_kv_heads), (n_keys, form.n_kv_heads))
    inputs = [torch.randn(2, n, heads, form.d_head, generator=generator).to(device, query.dtype) for n, heads in shapes]
    upstream = torch.randn(2, length, form.n_heads, form.d_head, generator=generator).to(device, query.dtype)

    def outcome(run: Callable[..., Any], which: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_(query.grad) for x in inputs]
        with torch.set_grad_enabled(query.grad):
            out = run(*leaves, form, which.prepare(layout, form, dtype))
        grads = torch.autograd.grad(out, leaves, upstream.to(dtype)) if query.grad else ()
        return [out.detach(), *grads]

    got = outcome(impl.run, impl, query.dtype)
    wanted = outcome(REFERENCE.run, REFERENCE, torch.float64)
    tolerance = ATTENTION.tolerances[query.dtype]
    for name, a, b in zip(("output", "gradient of q", "gradient of k", "gradient of v"), got, wanted):
        fault = tolerance.fault(name, a, b)
        if fault is not None:
            return fault
    return None


def sample_layout(mode: Mode, length: int, device: torch.device) -> Layout:
    """Two rows of `length` tokens with documents of odd lengths, or a half-filled state."""
    steps = torch.arange(length, device=device)
    if mode == "causal":
        return Layout(steps.expand(2, length))
    if mode == "positions":
        earlier = 7
        return Layout(
            steps.expand(2, length) + earlier, k_positions=torch.arange(length + earlier, device=device).expand(2, -1)
        )
    cuts = (length // 3, length // 2 + 1)
    positions = torch.stack([torch.where(steps < cut, steps, steps - cut) for cut in cuts])
    offsets = [0, cuts[0], length, length + cuts[1], 2 * length]
    return Layout(
        positions,
        documents=(positions == 0).long().cumsum(1),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device),
        max_seqlen=1 << (length - 1).bit_length(),
    )


ATTENTION = register_op(
    OpSpec(
        "attention",
        tolerances={
            torch.float64: Tolerance(1e-10, 1e-8),
            torch.float32: Tolerance(2e-5, 1e-4),
            torch.float16: Tolerance(1e-2, 1e-2),
            torch.bfloat16: Tolerance(3e-2, 5e-2),
        },
        check=check_attention,
    )
)
