"""Linear attention by chunks of tokens: matrix products within a chunk, a recurrence of states between chunks.

Linear in T. Products are taken in the dtype of the inputs; decays, states and sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_attention.spec import LINEAR_ATTENTION, SMALLEST_LOG_DECAY, LinearAttentionQuery


class ChunkedLinearAttention:
    """Works on every device, and compiles."""

    name = "chunked"
    kind = "torch"

    def priority(self, query: LinearAttentionQuery) -> int:
        return 50

    def supports(self, query: LinearAttentionQuery) -> Literal[True] | str:
        return True

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        starts: Tensor | None = None,
        state: Tensor | None = None,
        valid: Tensor | None = None,
        chunk: int = 64,
    ) -> tuple[Tensor, Tensor]:
        """(y [B, T, H, V] in the dtype of v, state [B, H, K, V])."""
        with torch.autocast(q.device.type, enabled=False):
            if q.shape[1] == 1 and starts is None and valid is None:
                return one_token(q, k, v, log_decay, state)
            return _chunked(q, k, v, log_decay, starts, state, valid, min(chunk, q.shape[1]))


def one_token(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for a single token."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (batch, _, groups, d_key), (heads, d_value) = q.shape, v.shape[2:]
    repeats = heads // groups
    update = k.to(wide).reshape(batch, groups, 1, d_key, 1) * v.to(wide).reshape(batch, groups, repeats, 1, d_value)
    s = update.reshape(batch, heads, d_key, d_value)
    if state is not None:
        before = state.to(wide)
        if log_decay is not None:
            before = before * log_decay.to(wide).exp().expand(batch, 1, heads).reshape(batch, heads, 1, 1)
        s = s + before
    y = q.to(wide).reshape(batch, groups, 1, 1, d_key) @ s.reshape(batch, groups, repeats, d_key, d_value)
    return y.reshape(batch, 1, heads, d_value).to(v.dtype), s


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    state: Tensor | None,
    valid: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Letters below: b rows, n chunks, i and j tokens of a chunk, g query-key heads, r value heads of each, k, v."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (batch, length, groups, d_key), (heads, d_value) = q.shape, v.shape[2:]
    repeats = heads // groups
    if valid is not None:
        k = torch.where(valid[..., None, None], k, 0.0)
    padding = -length % size
    q, k, v = (by_chunk(x, size, padding) for x in (q, k, v))
    n_chunks = q.shape[1]
    decays = Decays.of(log_decay, starts, valid, batch, length, size, padding, heads, wide, q.device)

    # b n g i k and b n g i (r v): all value heads of a group go through one product with the keys.
    q, k = q.transpose(2, 3), k.transpose(2, 3)
    values = v.unflatten(3, (groups, repeats)).permute(0, 1, 3, 2, 4, 5)
    to_end = decays.grouped(decays.to_end, groups).permute(0, 1, 2, 4, 3)[..., None]
    added = k.transpose(-1, -2) @ (values * to_end.to(v.dtype)).flatten(-2)
    s = q.new_zeros(batch, groups, d_key, repeats * d_value, dtype=wide)
    if state is not None:
        s = state.to(wide).unflatten(1, (groups, repeats)).transpose(2, 3).flatten(-2)
    carried = decays.grouped(decays.whole, groups)[:, :, :, None, :, None].expand(-1, n_chunks, -1, 1, repeats, d_value)
    carried = carried.flatten(-2)
    before = []
    for kept, new in zip(carried.unbind(1), added.unbind(1)):  # the gradient of an index would fill all chunks
        before.append(s)
        s = kept * s + new
    read = q @ torch.stack(before, dim=1).to(q.dtype)
    from_start = decays.grouped(decays.from_start, groups).permute(0, 1, 2, 4, 3)[..., None]
    y = read.unflatten(-1, (repeats, d_value)) * from_start

    scores = (q @ k.transpose(-1, -2))[:, :, :, None] * decays.grouped(decays.within, groups)
    inside = scores.to(v.dtype) @ values.transpose(3, 4)
    y = (y + inside.transpose(3, 4)).to(v.dtype)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, n_chunks * size, heads, d_value)[:, :length]
    s = s.unflatten(-1, (repeats, d_value)).transpose(2, 3).reshape(batch, heads, d_key, d_value)
    return y, s


class Decays:
    """Products of decays in each chunk, zero where a document starts between; leading dimensions may be 1.

    within [B, N, H, C, C]: from token j (later dimension) to token i >= j. from_start [B, N, H, C]: from before the
    chunk to token i. to_end [B, N, H, C]: from token j to the chunk's last. whole [B, N, H]: over the chunk.
    """

    def __init__(self, cumulative: Tensor, documents: Tensor | None) -> None:
        """cumulative [B, N, H, C] sums of log decays, documents [B, N, C] number of starts up to each token."""
        size = cumulative.shape[-1]
        causal = torch.ones(size, size, dtype=torch.bool, device=cumulative.device).tril()
        last = cumulative[..., -1:]
        if documents is None:
            self.within = _masked_exp(cumulative[..., :, None] - cumulative[..., None, :], causal)
            self.from_start = cumulative.exp()
            self.to_end = (last - cumulative).exp()
            self.whole = last[..., 0].exp()
            return
        same = causal & (documents[..., :, None] == documents[..., None, :])
        self.within = _masked_exp(cumulative[..., :, None] - cumulative[..., None, :], same[:, :, None])
        self.from_start = _masked_exp(cumulative, (documents == 0)[:, :, None])
        self.to_end = _masked_exp(last - cumulative, (documents == documents[..., -1:])[:, :, None])
        self.whole = _masked_exp(last[..., 0], (documents[..., -1] == 0)[:, :, None])

    @staticmethod
    def of(
        log_decay: Tensor | None,
        starts: Tensor | None,
        valid: Tensor | None,
        batch: int,
        length: int,
        size: int,
        padding: int,
        heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Decays:
        """log_decay [B, T, H], [H] or None; starts, valid [B, T] or None. Padding neither decays nor starts."""
        if log_decay is None:
            logs = torch.zeros(1, 1, 1, dtype=dtype, device=device)
        else:
            logs = log_decay.to(dtype).clamp(min=SMALLEST_LOG_DECAY[dtype])
            logs = logs[None, None] if logs.dim() == 1 else logs
        if valid is not None:
            logs = torch.where(valid[..., None], logs, 0.0)
        if logs.shape[1] == 1 and (padding == 0 or log_decay is None):
            logs = logs.expand(-1, size, -1)  # all chunks are alike
        else:
            logs = F.pad(logs.expand(-1, length, -1), (0, 0, 0, padding))
        cumulative = logs.unflatten(1, (-1, size)).transpose(2, 3).cumsum(-1)
        if starts is None:
            return Decays(cumulative, None)
        if valid is not None:
            starts = starts & valid
        return Decays(cumulative, F.pad(starts, (0, padding)).unflatten(1, (-1, size)).long().cumsum(-1))

    @staticmethod
    def grouped(decay: Tensor, groups: int) -> Tensor:
        """[B, N, H, ...] -> [B, N, G, H / G, ...]; a decay that is the same for all heads stays so."""
        return decay.unsqueeze(3) if decay.shape[2] == 1 else decay.unflatten(2, (groups, -1))


def _masked_exp(logs: Tensor, mask: Tensor) -> Tensor:
    """exp(logs), zero where the mask is False; masked before exp, since what is masked may overflow."""
    return logs.masked_fill(~mask, float("-inf")).exp()


def by_chunk(x: Tensor, size: int, padding: int) -> Tensor:
    """[B, T, ...] -> [B, N, C, ...], padded with zeros on the right."""
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return x.unflatten(1, (-1, size))


CHUNKED = LINEAR_ATTENTION.add(ChunkedLinearAttention())
