"""Attention through torch.nn.attention.flex_attention: masks as code, whole blocks of invisible keys left out."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention.spec import ATTENTION, AttentionForm, AttentionQuery, Layout


@functools.cache
def _compiled(name: str) -> Any:
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name), dynamic=False)


class FlexAttention:
    """Packed documents, windows, soft-cap and ALiBi on a GPU; on a CPU without gradients only."""

    name = "flex"
    kind = "torch"

    def priority(self, query: AttentionQuery) -> int:
        form = query.form
        special = (
            query.mode == "packed" or form.window is not None or form.softcap is not None or form.slopes is not None
        )
        if query.device != "cuda":
            return -1  # it holds all scores there: only where it is asked for
        return 60 if special else 40

    def supports(self, query: AttentionQuery) -> Literal[True] | str:
        if query.mode == "positions":
            return "it serves whole sequences, not keys of a decode state"
        if query.form.n_persistent:
            return "it has no persistent keys"
        if query.device == "cpu" and query.grad:
            return "FlexAttention has no gradients on a CPU"
        if query.device not in ("cpu", "cuda"):
            return f"FlexAttention does not run on {query.device}"
        if query.dtype == torch.float64:
            return "FlexAttention does not take float64"
        form = query.form
        if query.device == "cuda" and (form.d_head < 16 or form.d_head & (form.d_head - 1)):
            return f"d_head {form.d_head} is not a power of two of at least 16"
        return True

    def prepare(self, layout: Layout, form: AttentionForm, dtype: torch.dtype) -> dict[str, Any]:
        """The block mask and the slopes, for all layers of the same form."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, length = layout.positions.shape
        documents, positions = layout.documents, layout.positions
        window, n_sinks = form.window, form.n_sinks

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = i >= j
            if documents is not None:
                seen = seen & (documents[b, i] == documents[b, j])
            if window is not None:
                near = i - j < window
                seen = seen & (near | (positions[b, j] < n_sinks) if n_sinks else near)
            return seen

        by_row = documents is not None or (window is not None and n_sinks > 0)
        create = _compiled("create_block_mask") if positions.device.type == "cuda" else create_block_mask
        block_mask = create(mask_mod, batch if by_row else None, None, length, length, device=positions.device)
        slopes = None if form.slopes is None else torch.tensor(form.slopes, device=positions.device)
        return {"block_mask": block_mask, "slopes": slopes}

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, prepared: dict[str, Any], lse: bool = False
    ) -> Any:
        """o [B, T, H, Dv], and with `lse` the log-sum-exp [B, T, H]."""
        from torch.nn.attention.flex_attention import flex_attention

        inline = torch.compiler.is_compiling() or q.device.type == "cpu"
        attend = flex_attention if inline else _compiled("flex_attention")
        softcap, slopes = form.softcap, prepared["slopes"]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if slopes is None else score - slopes[h] * (i - j)

        out = attend(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=score_mod if softcap is not None or slopes is not None else None,
            block_mask=prepared["block_mask"],
            scale=form.scale,
            enable_gqa=form.n_kv_heads != form.n_heads,
            **_lse_arguments(lse),
        )
        if lse:
            out, auxiliary = out
            return out.transpose(1, 2), auxiliary.lse.transpose(1, 2)
        return out.transpose(1, 2)


def _lse_arguments(lse: bool) -> dict[str, Any]:
    if not lse:
        return {}
    from torch.nn.attention.flex_attention import AuxRequest

    return {"return_aux": AuxRequest(lse=True)}


FLEX = ATTENTION.add(FlexAttention())
