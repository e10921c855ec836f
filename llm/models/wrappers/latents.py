"""Layers over latent vectors: attention between them and tokens, and transformer layers among them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.blocks.base import BuildCtx, ChannelConfig
from llm.blocks.channels.mlp import MLPConfig
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, KVState

if TYPE_CHECKING:
    from llm.models.config import ModelConfig


class CrossAttention(nn.Module):
    """x + out(attention of q(norm(x)) to k, v of norm(y)): q [W -> R], k, v [Wy -> R], out [R -> W]."""

    def __init__(self, ctx: BuildCtx, width: int, other: int, inner: int, n_heads: int, role: str, bias: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_norm = ctx.norm(width, role=f"{role}.q_norm")
        self.kv_norm = ctx.norm(other, role=f"{role}.kv_norm")
        self.q = ctx.linear(width, inner, role=f"{role}.q", bias=bias)
        self.k = ctx.linear(other, inner, role=f"{role}.k", bias=bias)
        self.v = ctx.linear(other, inner, role=f"{role}.v", bias=bias)
        self.out = ctx.linear(inner, width, role=f"{role}.out", bias=bias)

    def project(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, H, Dh] of what is attended to, y [B, S, Wy]."""
        y = self.kv_norm(y)
        return _heads(self.k(y), self.n_heads), _heads(self.v(y), self.n_heads)

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x [B, L, W] after attending to all of k, v."""
        return x + self.out(_attention(_heads(self.q(self.q_norm(x)), self.n_heads), k, v, None))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, L, W], y [B, S, Wy] -> [B, L, W]."""
        return self.attend(x, *self.project(y))


class LatentLayer(nn.Module):
    """A pre-norm transformer layer over latents: q, k, v, out [E -> E] and a channel mixer."""

    def __init__(self, ctx: BuildCtx, width: int, n_heads: int, bias: bool, channel: ChannelConfig) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.mixer_norm = ctx.norm(width, role="residual.mixer_norm")
        self.channel_norm = ctx.norm(width, role="residual.channel_norm")
        self.q, self.k, self.v, self.out = (
            ctx.linear(width, width, role=f"wrapper.latent.{name}", bias=bias) for name in ("q", "k", "v", "out")
        )
        self.channel = channel.build(ctx)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.mixer_norm(x)
        return tuple(_heads(part(y), self.n_heads) for part in (self.q, self.k, self.v))

    def _join(self, x: Tensor, attended: Tensor, seq: SeqInfo) -> Tensor:
        x = x + self.out(attended)
        return x + self.channel(self.channel_norm(x), seq)

    def forward(self, x: Tensor, seen: Tensor, seq: SeqInfo) -> Tensor:
        """x [B, L, E]; seen [L, L] bool: which latents each one sees."""
        q, k, v = self._project(x)
        return self._join(x, _attention(q, k, v, seen), seq)

    def step(self, x: Tensor, state: DecodeState, counts: Tensor, seq: SeqInfo) -> Tensor:
        """Latents x [B, m, E] of one more group, which see one another and all in `state`, to which counts[b] of row b
        are added."""
        assert isinstance(state, KVState)
        q, k, v = self._project(x)
        k, v, positions = state.append(k, v, counts)
        # A row that adds none may hold none; it sees something, so that its output, which nobody reads, is finite.
        seen = positions < state.end().clamp(min=1)[:, None]
        return self._join(x, _attention(q, k.to(q.dtype), v.to(q.dtype), seen[:, None, None]), seq)


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1))


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """[B, L, H * Dh] of q [B, L, H, Dh] and k, v [B, S, H, Dh]; seen: bool, broadcast to [B, H, L, S]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k.to(q.dtype), v.to(q.dtype)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)


def latent_channel(settings: Any, model: ModelConfig) -> ChannelConfig:
    """The channel mixer of latent layers."""
    return settings.channel if settings.channel is not None else MLPConfig(bias=settings.bias)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """[..., width] fp32: sines and cosines of positions [...]."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=positions.device, dtype=torch.float32) * (-math.log(1e4) / half))
    angles = positions[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]
