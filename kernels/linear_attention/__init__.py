"""Linear attention with decay: S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ, y_t = q_t S_t."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.linear_attention import chunked, reference  # noqa: F401
from kernels.linear_attention.spec import LINEAR_ATTENTION, LinearAttentionQuery

__all__ = ["LINEAR_ATTENTION", "LinearAttentionQuery", "linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    valid: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V] in the dtype of v, state [B, H, K, V] after the last real token, at least fp32).

    q, k [B, T, G, K] and v [B, T, H, V] of one dtype, H a multiple of G; log_decay [B, T, H] or [H] or None (no decay);
    starts [B, T] bool: first tokens of documents, before which the state is forgotten; state [B, H, K, V] before the
    first token; valid [B, T] bool: False for padding on the right, which advances nothing. chunk: tokens of a chunk.
    """
    if torch.compiler.is_compiling():
        return chunked.CHUNKED.run(q, k, v, log_decay, starts, state, valid, chunk)
    query = LinearAttentionQuery(q.device.type, q.dtype, log_decay is not None)
    implementation = dispatch.resolve("linear_attention", query)
    return implementation.run(q, k, v, log_decay, starts, state, valid, chunk)
