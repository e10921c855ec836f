"""Causal attention whose weights are products of features, as the linear-attention mixers of several papers share it.

o_t = Σ_{s ≤ t} (φ(q_t) · φ(k_s)) v_s / (Σ_{s ≤ t} φ(q_t) · φ(k_s) + eps) per head, within the document: linear in T,
and the numerator and denominator of all heads are one state [H, K, V + 1] in fp32, whatever the context.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_attention import linear_attention
from llm.blocks.base import Caps, PositionEncoding, TokenMixer
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, RecurrentState, valid_counts

CHUNK = 64

Factors = dict[str, Tensor]


class FeatureAttention(TokenMixer):
    """A subclass sets n_heads, d_feature, d_head and `out`, and says what its features are."""

    caps = Caps(rollback="replay")
    n_heads: int
    d_feature: int
    d_head: int
    out: nn.Module
    eps: float = 1e-6
    slopes: tuple[float, ...] | None = None
    """By head: weights are multiplied by exp(-slope * distance), as a bias -slope * distance on scores does (ALiBi)."""

    def features(self, x: Tensor, seq: SeqInfo) -> Factors:
        """q, k [B, T, H, K] (features) and v [B, T, H, V] of x [B, T, D], at least fp32."""
        raise NotImplementedError

    def finish(self, sums: Tensor, factors: Factors, seq: SeqInfo) -> Tensor:
        """Outputs [B, T, H, V] of the sums [B, T, H, V + 1], the last of which is that of the weights alone."""
        return sums[..., :-1] / (sums[..., -1:] + self.eps)

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self._run(x, seq, None)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        return self._run(x, seq, state)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        return RecurrentState(
            batch,
            self.state_shapes(),
            n_tentative=n_tentative,
            policy="replay",
            factors={"k": (self.n_heads, self.d_feature), "v": (self.n_heads, self.d_head)},
            update=self.replay,
            dtype=torch.promote_types(dtype, torch.float32),
            device=device,
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a row's state."""
        return {"s": (self.n_heads, self.d_feature, self.d_head + 1)}

    def _run(self, x: Tensor, seq: SeqInfo, state: DecodeState | None) -> Tensor:
        factors = self.features(x, seq)
        outputs = self.finish(self.remember(factors, seq, state), factors, seq)
        return self.out(outputs.flatten(2).to(x.dtype))

    def remember(self, factors: Factors, seq: SeqInfo, state: DecodeState | None) -> Tensor:
        """The sums [B, T, H, V + 1] of each token; `state` is advanced."""
        if state is None:
            return self.scan(factors, {}, starts=seq.starts() if seq.packed else None, valid=None)[0]
        assert isinstance(state, RecurrentState)
        sums, final = self.scan(factors, state.read(), starts=None, valid=seq.valid)
        counts = valid_counts(seq)
        counts = torch.full_like(state.length, sums.shape[1]) if counts is None else counts
        state.write(final, counts, factors={name: factors[name] for name in ("k", "v")})
        return sums

    def scan(
        self, factors: Factors, before: Factors, *, starts: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Factors]:
        """(sums [B, T, H, V + 1], the state after the last real token) from the state `before`, empty at the start."""
        q, k, v = factors["q"], factors["k"], with_ones(factors["v"])
        decay = None if self.slopes is None else -torch.tensor(self.slopes, dtype=q.dtype, device=q.device)
        sums, s = linear_attention(q, k, v, decay, starts, before.get("s"), valid, CHUNK)
        return sums, {"s": s}

    def replay(self, before: Factors, factors: Factors, counts: Tensor) -> Factors:
        """The state after the first counts[b] tokens, whose keys and values are given."""
        valid = torch.arange(factors["k"].shape[1], device=counts.device) < counts[:, None]
        return self.scan({**factors, "q": torch.zeros_like(factors["k"])}, before, starts=None, valid=valid)[1]


def slopes_of(position: PositionEncoding, n_heads: int) -> tuple[float, ...] | None:
    """What a position encoding asks for as a bias on the scores of each head."""
    slopes = position.slopes(n_heads)
    return None if slopes is None else tuple(slopes.tolist())


def with_ones(v: Tensor) -> Tensor:
    """[..., V] -> [..., V + 1]: a column of ones, which sums the weights."""
    return F.pad(v, (0, 1), value=1.0)


def head_width(name: str, d_model: int, n_heads: int, d_head: int | None) -> int:
    """Width of a head; UserError when the model's width cannot be divided among them."""
    if d_head is None and d_model % n_heads:
        raise UserError(f"{name}: d_model {d_model} is not divisible by n_heads {n_heads}; set d_head or change one")
    return d_head or d_model // n_heads


def feature_cost(n_heads: int, d_feature: int, d_head: int, seq_len: int, mode: Mode, dtype_bytes: int) -> Cost:
    """Cost of the sums and their state: products with the state, and the causal part of the square in each chunk."""
    elements = n_heads * d_feature * (d_head + 1)
    state = elements * max(4, dtype_bytes)
    if mode == "decode":
        return Cost(flops_per_token=4.0 * elements, state_bytes_per_seq=state)
    seen = (min(CHUNK, seq_len) + 1) / 2
    inside = 2.0 * n_heads * (d_feature + d_head + 1) * seen
    return Cost(flops_per_token=4.0 * elements + inside, attention_flops=inside, state_bytes_per_seq=state)


def to_heads(x: Tensor, width: int) -> Tensor:
    """[B, T, H * width] -> [B, T, H, width], at least fp32."""
    heads: Any = x.unflatten(-1, (-1, width))
    return heads.to(torch.promote_types(x.dtype, torch.float32))
