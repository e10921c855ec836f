"""The delta rule with optional decay: S_t = d_t S_{t-1} + beta_t k_t (v_t - k_t d_t S_{t-1})ᵀ, y_t = q_t S_t."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.delta_rule import chunked, reference  # noqa: F401
from kernels.delta_rule.spec import DELTA_RULE, DeltaRuleQuery

__all__ = ["DELTA_RULE", "DeltaRuleQuery", "delta_rule"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    valid: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V] in the dtype of v, state [B, H, K, V] after the last real token, at least fp32).

    q, k [B, T, G, K] and v [B, T, H, V] of one dtype, H a multiple of G, keys best of length 1; beta [B, T, H] step
    sizes in [0, 2]; log_decay [B, T, H] or [H] or None (no decay); starts [B, T] bool: first tokens of documents,
    before which the state is forgotten; state [B, H, K, V] before the first token; valid [B, T] bool: False for padding
    on the right, which advances nothing. chunk: tokens of a chunk.
    """
    if torch.compiler.is_compiling():
        return chunked.CHUNKED.run(q, k, v, beta, log_decay, starts, state, valid, chunk)
    query = DeltaRuleQuery(q.device.type, q.dtype, log_decay is not None)
    implementation = dispatch.resolve("delta_rule", query)
    return implementation.run(q, k, v, beta, log_decay, starts, state, valid, chunk)
