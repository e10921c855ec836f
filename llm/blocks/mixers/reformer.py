"""Reformer's attention by locality-sensitive hashing, in a causal form that decodes exactly.

The published layer cuts the tokens, sorted by bucket, into chunks; where the cuts fall depends on how many later tokens
fall into earlier buckets, so what a token sees depends on its future. Here a token sees, in each round of hashing, the
last `window` tokens of its own bucket up to itself: the same sort and the same linear work, and nothing of the future.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kernels.banded_attention import banded_attention, merge
from kernels.banded_attention.blocked import HIDDEN
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.feature_attention import head_width, slopes_of
from llm.blocks.linears.dense import project
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.init import Init, normal
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, KVState, valid_counts

SELF = -1e4
"""Score of a token with itself: it counts only where a token sees no other in any round."""


@MIXERS.register(
    "reformer",
    tiny=lambda: ReformerConfig(n_heads=2, n_buckets=4, n_hashes=2, window=8),
    paper="Kitaev et al. 2020 (arXiv:2001.04451)",
    status="experimental",
    tinies={"one_round": lambda: ReformerConfig(n_heads=2, d_head=12, n_buckets=2, n_hashes=1, window=5, bias=True)},
    about=About(
        equation="y_t = softmax attention over the last w tokens of t's bucket argmax [xR; −xR], in several rounds",
        use="Long contexts in which few keys matter and are near their queries in direction.",
        weakness="Queries and keys are one projection; keys in other buckets are missed; decoding keeps all keys and "
        "looks at each; sorting makes training slower than windows of the same size.",
    ),
)
class ReformerConfig(MixerConfig):
    """LSH attention with shared queries and keys.

    n_buckets: per round, an even number; n_hashes: rounds, combined by their log-sum-exps. window: tokens of the bucket
    that a query sees in a round, itself among them. bias: on all projections.
    """

    n_heads: int = Field(ge=1)
    d_head: int | None = Field(None, ge=1)
    n_buckets: int = Field(32, ge=2)
    n_hashes: int = Field(4, ge=1)
    window: int = Field(64, ge=2)
    bias: bool = False

    @field_validator("n_buckets")
    @classmethod
    def _in_pairs(cls, value: int) -> int:
        if value % 2:
            raise UserError(f"reformer: n_buckets must be even, since each direction is two buckets; given {value}")
        return value

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return Reformer(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d_head = head_width(self.type, dims.d_model, self.n_heads, self.d_head)
        inner = self.n_heads * d_head
        cost = sum((dims.linear(dims.d_model, inner, role=f"mixer.{r}", bias=self.bias) for r in "qv"), Cost())
        cost = cost + dims.linear(inner, dims.d_model, role="mixer.out", bias=self.bias)
        cost = cost + Cost(flops_per_token=1.0 * inner * self.n_buckets * self.n_hashes)
        state = seq_len * (2 * inner * dims.state_dtype_bytes + 4 * self.n_heads * self.n_hashes)
        if mode == "decode":
            scores = 4.0 * inner * (seq_len + 1)
            return cost + Cost(flops_per_token=scores, attention_flops=scores, state_bytes_per_seq=state)
        size = min(self.window, seq_len)
        seen = self.n_hashes * (2 * size if seq_len > size else size)
        return cost + Cost(flops_per_token=4.0 * inner * seen, state_bytes_per_seq=state)


class LSHState(KVState):
    """Keys (unnormalised), values and, in `buckets` [B, slots, H, rounds] int32, where the keys fell."""

    def __init__(
        self, batch: int, capacity: int, n_heads: int, d_head: int, n_hashes: int, *, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        super().__init__(batch, capacity, n_heads, d_head, dtype=dtype, device=device)
        self.buckets = torch.zeros(batch, 0, n_heads, n_hashes, dtype=torch.int32, device=device)

    def append_hashed(
        self, k: Tensor, v: Tensor, buckets: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `append`, with buckets [B, T, H, rounds]; returns (k, v, buckets, positions)."""
        rows, slots, keep, _ = self._places(k.shape[1], self._counts(k.shape[1], counts))
        self.buckets[rows, slots] = (buckets if keep is None else buckets[keep]).to(torch.int32)
        keys, values, positions = self.append(k, v, counts)
        return keys, values, self.buckets[:, : keys.shape[1]], positions

    def _rows(self) -> dict[str, Tensor]:
        return super()._rows() | {"buckets": self.buckets}


class Reformer(TokenMixer):
    """qk, v [D -> H * d], out [H * d -> D]; buffer rotations [rounds, d, n_buckets / 2], the same for all heads."""

    caps = Caps(rollback="free", needs_positions=True)
    rotations: Tensor

    def __init__(self, config: ReformerConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.config = config
        self.d_head = head_width(config.type, ctx.d_model, config.n_heads, config.d_head)
        self.scale = self.d_head**-0.5
        inner = config.n_heads * self.d_head
        self.qk = ctx.linear(ctx.d_model, inner, role="mixer.q", bias=config.bias)
        self.v = ctx.linear(ctx.d_model, inner, role="mixer.v", bias=config.bias)
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out", bias=config.bias)
        self.position = ctx.position()
        self.position.for_heads(self.d_head)
        self.slopes = slopes_of(self.position, config.n_heads)
        self.register_buffer("rotations", torch.empty(config.n_hashes, self.d_head, config.n_buckets // 2))

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        self.position.prepare(seq, torch.promote_types(dtype, torch.float32))

    def _project(self, x: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, values [B, T, H, d] and buckets [B, T, H, rounds] of int64; keys are normalised queries."""
        q, v = (y.unflatten(-1, (-1, self.d_head)) for y in project(x, self.qk, self.v))
        q, _ = self.position.at_qk(q, q, seq)
        return q, v, self.hash(q)

    def hash(self, q: Tensor) -> Tensor:
        """[..., d] -> [..., rounds]: the nearest of the n_buckets directions ±R of each round."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            turned = torch.einsum("...d,rdn->...rn", q.detach().to(wide), self.rotations.to(wide))
            return torch.cat([turned, -turned], dim=-1).argmax(-1)

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        q, v, buckets = self._project(x, seq)
        return self.out(self._attend_sorted(q, v, buckets, seq).flatten(2).to(x.dtype))

    def _attend_sorted(self, q: Tensor, v: Tensor, buckets: Tensor, seq: SeqInfo) -> Tensor:
        """[B, T, H, d]: each round sorts tokens by document and bucket, and attends along a band of the sorted row."""
        segments = buckets
        if seq.packed:
            segments = seq.document_ids()[..., None, None] * self.config.n_buckets + buckets
        segments = segments.permute(3, 0, 2, 1).flatten(0, 2)  # [rounds * B * H, T]
        order = segments.argsort(dim=-1, stable=True)
        back = order.argsort(dim=-1)
        k = normalised(q)

        def sort(y: Tensor) -> Tensor:
            """[B, T, H, d] -> [rounds * B * H, T, 1, d]"""
            rows = y.transpose(1, 2).flatten(0, 1).repeat(self.config.n_hashes, 1, 1)
            return rows.take_along_dim(order[..., None], dim=1)[:, :, None]

        bias: dict[str, Tensor] = {}
        if self.slopes is not None:
            rows = seq.positions.repeat_interleave(q.shape[2], dim=0).repeat(self.config.n_hashes, 1)
            bias["positions"] = rows.take_along_dim(order, dim=1)
            bias["slopes"] = self._slopes(q).repeat(self.config.n_hashes * q.shape[0])[:, None]

        o, lse = banded_attention(
            sort(q), sort(k), sort(v), self.config.window, segments.take_along_dim(order, dim=1),
            scale=self.scale, self_score=SELF, **bias,
        )  # fmt: skip
        shape = (self.config.n_hashes, q.shape[0], q.shape[2])
        o = o[:, :, 0].take_along_dim(back[..., None], dim=1).unflatten(0, shape).transpose(2, 3)
        lse = lse[..., 0].take_along_dim(back, dim=1).unflatten(0, shape).transpose(2, 3)
        return merge(list(zip(o, lse)))[0]

    def _slopes(self, like: Tensor) -> Tensor:
        """[H]"""
        return torch.tensor(self.slopes, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, LSHState)
        q, v, buckets = self._project(x, seq)
        whole = state.extent == 0 and x.shape[1] > 1
        k, values, key_buckets, positions = state.append_hashed(q, v, buckets, valid_counts(seq))
        if whole:
            o = self._attend_sorted(q, v, buckets, SeqInfo(seq.positions))
        else:
            o = self._attend_cached(q, k.to(q.dtype), values.to(q.dtype), buckets, key_buckets, seq, positions)
        return self.out(o.flatten(2).to(x.dtype))

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, key_buckets: Tensor, seq: SeqInfo, positions: Tensor
    ) -> Tensor:
        """[B, T, H, d] of T queries against all S keys: a key counts once for each round in which it is seen."""
        back = (seq.positions[:, :, None] - positions[:, None])[:, None, None]  # [B, 1, 1, T, S]
        same = buckets.permute(0, 3, 2, 1)[..., None] == key_buckets.permute(0, 3, 2, 1)[:, :, :, None]
        same = same & (back >= 0)
        younger = same.flip(-1).cumsum(-1).flip(-1)
        rounds = (same & (younger <= self.config.window)).sum(1)  # [B, H, T, S]
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bthd,bshd->bhts", q, normalised(k)).to(wide) * self.scale
        if self.slopes is not None:
            scores = scores - self._slopes(q)[:, None, None] * back[:, 0]
        scores = torch.where(back[:, 0] == 0, SELF, scores) + rounds.to(wide).log()
        weights = scores.clamp(min=HIDDEN).softmax(-1).to(v.dtype)
        return torch.einsum("bhts,bshd->bthd", weights, v)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        return LSHState(
            batch, capacity + n_tentative, self.config.n_heads, self.d_head, self.config.n_hashes, dtype=dtype,
            device=device,
        )  # fmt: skip

    def init_spec(self) -> dict[str, Init]:
        return {"rotations": normal(1.0)}


def normalised(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; zeros stay zeros."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-12)).to(x.dtype)
