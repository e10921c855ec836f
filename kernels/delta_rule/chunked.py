"""The delta rule by chunks of tokens, in the WY form of Yang et al. 2024: linear in T, and made of matrix products.

What the tokens of a chunk write depends on the state S before the chunk only through a linear map. With G_i the product
of decays from the chunk's start to token i,

    (I + A) U = diag(beta) (V - diag(G) K S)        A_ij = beta_i (k_i · k_j) G_i / G_j  for j < i

The unit triangular system is solved by substitution, which stays exact where keys resemble one another; a sum of powers
of A would not. It is solved in fp32 (fp64 for fp64 inputs); the other products take the dtype of the inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.delta_rule.spec import DELTA_RULE, DeltaRuleQuery
from kernels.linear_attention.chunked import Decays, by_chunk


class ChunkedDeltaRule:
    """Works on every device, and compiles."""

    name = "chunked"
    kind = "torch"

    def priority(self, query: DeltaRuleQuery) -> int:
        return 50

    def supports(self, query: DeltaRuleQuery) -> Literal[True] | str:
        return True

    def run(
        self,
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
        """(y [B, T, H, V] in the dtype of v, state [B, H, K, V])."""
        repeats = v.shape[2] // q.shape[2]
        if repeats > 1:
            q, k = q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)
        with torch.autocast(q.device.type, enabled=False):
            if q.shape[1] == 1 and starts is None and valid is None:
                return one_token(q, k, v, beta, log_decay, state)
            return _chunked(q, k, v, beta, log_decay, starts, state, valid, min(chunk, q.shape[1]))


def one_token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for a single token."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, u = (x[:, 0, :, None].to(wide) for x in (q, k, v))  # [B, H, 1, K or V]
    step = beta[:, 0, :, None, None].to(wide)
    if state is None:
        s = k.transpose(-1, -2) * (step * u)
    else:
        before = state.to(wide)
        if log_decay is not None:
            before = before * log_decay.to(wide).exp().expand(q.shape[0], 1, -1)[:, 0, :, None, None]
        s = before + k.transpose(-1, -2) * (step * (u - k @ before))
    return (q @ s)[:, None, :, 0].to(v.dtype), s


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    state: Tensor | None,
    valid: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K]; within, tensors are [B, N, H, C, ...]: N chunks of C tokens."""
    low, wide = v.dtype, torch.promote_types(q.dtype, torch.float32)
    (batch, length, heads, d_key), d_value = q.shape, v.shape[3]
    if valid is not None:
        k = torch.where(valid[..., None, None], k, 0.0)
    padding = -length % size
    q, k, v = (by_chunk(x, size, padding).transpose(2, 3) for x in (q, k, v))
    step = by_chunk(beta.to(wide), size, padding).transpose(2, 3)[..., None]
    decays = Decays.of(log_decay, starts, valid, batch, length, size, padding, heads, wide, q.device)
    n_chunks = q.shape[1]

    keys = k.transpose(-1, -2)
    from_start = decays.from_start[..., None]
    system = (k @ keys).to(wide) * decays.within * step
    given = torch.cat([k * (step * from_start), v * step], dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    of_state, written = solved.split([d_key, d_value], dim=-1)
    of_state = of_state.to(low)
    to_end = (keys * decays.to_end[..., None, :]).to(low)
    whole = decays.whole[..., None, None].expand(-1, n_chunks, -1, -1, -1)

    s = v.new_zeros(batch, heads, d_key, d_value, dtype=wide) if state is None else state.to(wide)
    before, updates = [], []
    # unbind, since the gradient of an index would fill all chunks
    for new, read, write, kept in zip(*(parts.unbind(1) for parts in (written, of_state, to_end, whole))):
        before.append(s.to(low))
        updates.append((new - read @ before[-1]).to(low))
        s = kept * s + write @ updates[-1]
    scores = ((q @ keys) * decays.within).to(low)
    y = (q @ torch.stack(before, dim=1)) * from_start + scores @ torch.stack(updates, dim=1)
    return y.to(low).transpose(2, 3).flatten(1, 2)[:, :length], s


CHUNKED = DELTA_RULE.add(ChunkedDeltaRule())
