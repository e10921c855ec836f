"""Longformer in its causal form: sliding windows, dilated by head, and global tokens at the start of each document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.banded_attention import banded_attention, merge
from kernels.banded_attention.blocked import HIDDEN
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.feature_attention import head_width, slopes_of
from llm.blocks.linears.dense import project
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, DecodeState, KeyValueState, KVState, WindowState, valid_counts


@MIXERS.register(
    "longformer",
    tiny=lambda: LongformerConfig(n_heads=2, window=5, n_global=2),
    paper="Beltagy et al. 2020 (arXiv:2004.05150)",
    status="experimental",
    tinies={
        "dilated": lambda: LongformerConfig(n_heads=4, window=3, dilations=(1, 3)),
        "global_projections": lambda: LongformerConfig(
            n_heads=2, window=4, dilations=(1, 2), n_global=2, global_projections=True, bias=True
        ),
    },
    about=About(
        equation="y_t = softmax attention over t, t − δ, …, t − (w − 1) δ and the document's first g tokens; δ by head",
        use="Long contexts in linear time and constant memory, where what matters is near or at the start.",
        weakness="Nothing between the window and the global tokens is seen but through depth; with g = 0 and δ = 1 it "
        "is attention with a window.",
    ),
)
class LongformerConfig(MixerConfig):
    """Sliding-window attention with dilation and global tokens.

    window: keys per query, itself among them. dilations: distances between them, one for each group of n_heads /
    len(dilations) heads. n_global: the first tokens of a document, which every later one sees. global_projections:
    those tokens' own attention has query, key and value projections of its own; in a causal model it concerns no other
    token, and packed rows pay for it at every one. bias: on all projections.
    """

    n_heads: int = Field(ge=1)
    d_head: int | None = Field(None, ge=1)
    window: int = Field(256, ge=1)
    dilations: tuple[int, ...] = Field((1,), min_length=1)
    n_global: int = Field(0, ge=0)
    global_projections: bool = False
    bias: bool = False

    @model_validator(mode="after")
    def _can_work(self) -> LongformerConfig:
        if min(self.dilations) < 1:
            raise UserError(f"longformer: dilations must be 1 or more, not {min(self.dilations)}")
        if self.n_heads % len(self.dilations):
            raise UserError(
                f"longformer: n_heads {self.n_heads} is not divisible by the number of dilations, {len(self.dilations)}"
            )
        if self.global_projections and not self.n_global:
            raise UserError("longformer: global_projections has no effect with n_global: 0; set n_global or remove it")
        return self

    def span(self) -> int:
        """How far back the widest window reaches, in tokens, the query's own among them."""
        return (self.window - 1) * max(self.dilations) + 1

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return Longformer(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d_head = head_width(self.type, dims.d_model, self.n_heads, self.d_head)
        inner = self.n_heads * d_head
        three = sum((dims.linear(dims.d_model, inner, role=f"mixer.{r}", bias=self.bias) for r in "qkv"), Cost())
        cost = three + dims.linear(inner, dims.d_model, role="mixer.out", bias=self.bias)
        size = min(self.window, seq_len)
        kept = min(seq_len, self.span() + self.n_global)
        if mode == "decode":
            seen = min(seq_len + 1, self.span() + self.n_global)
        else:
            # A block of queries meets its own keys and those of the block before.
            seen = (2 * size if seq_len > size else size) + min(self.n_global, seq_len)
        cost = cost + Cost(
            flops_per_token=4.0 * inner * seen, state_bytes_per_seq=2 * inner * kept * dims.state_dtype_bytes
        )
        if self.global_projections:
            ran = 1.0 if mode == "decode" else min(1.0, self.n_global / seq_len)
            own = ran * (three.flops_per_token + 4.0 * inner * (self.n_global + (mode == "decode")))
            past = 2 * inner * min(seq_len, self.n_global + 1) * dims.state_dtype_bytes
            cost = cost + Cost(three.params, three.active_params, own, state_bytes_per_seq=past)
        return cost


class Longformer(TokenMixer):
    """q, k, v (and q_global, k_global, v_global) [D -> H * d], out [H * d -> D]."""

    caps = Caps(rollback="free", needs_positions=True)

    def __init__(self, config: LongformerConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.config = config
        self.d_head = head_width(config.type, ctx.d_model, config.n_heads, config.d_head)
        self.scale = self.d_head**-0.5
        inner = config.n_heads * self.d_head

        def linear(role: str) -> nn.Module:
            return ctx.linear(ctx.d_model, inner, role=f"mixer.{role}", bias=config.bias)

        self.q, self.k, self.v = linear("q"), linear("k"), linear("v")
        self.q_global = linear("q") if config.global_projections else None
        self.k_global = linear("k") if config.global_projections else None
        self.v_global = linear("v") if config.global_projections else None
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out", bias=config.bias)
        self.position = ctx.position()
        self.position.for_heads(self.d_head)
        self.slopes = slopes_of(self.position, config.n_heads)

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        self.position.prepare(seq, torch.promote_types(dtype, torch.float32))

    def _project(self, x: Tensor, seq: SeqInfo, *linears: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (-1, self.d_head)) for y in project(x, *linears))
        q, k = self.position.at_qk(q, k, seq)
        return q, k.to(q.dtype), v

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        q, k, v = self._project(x, seq, self.q, self.k, self.v)
        documents = seq.document_ids() if seq.packed else None
        groups = zip(*(y.chunk(len(self.config.dilations), dim=2) for y in (q, k, v)))
        slopes = (
            [None] * len(self.config.dilations)
            if self.slopes is None
            else self._slopes(x).chunk(len(self.config.dilations), dim=1)
        )
        parts = [
            _dilated(query, key, value, self.config.window, dilation, documents, seq.positions, self.scale, slope)
            for dilation, (query, key, value), slope in zip(self.config.dilations, groups, slopes)
        ]
        o, lse = torch.cat([o for o, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)
        if self.config.n_global:
            o, _ = merge([(o, lse), self._read_global(q, k, v, seq)])
            if self.q_global is not None:
                o = self._global_rows(x, seq, o)
        return self.out(o.flatten(2).to(x.dtype))

    def _read_global(self, q: Tensor, k: Tensor, v: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor]:
        """Attention to the first tokens of each document, where they lie outside the query's window."""
        near = self._near(seq.positions[:, :, None] - torch.arange(self.config.n_global, device=q.device))
        scores, values = self._first_scores(q, k, v, seq)
        scores = self._biased(scores, seq.positions[:, :, None] - torch.arange(scores.shape[-1], device=q.device))
        before = seq.positions[:, :, None] >= torch.arange(self.config.n_global, device=q.device)
        seen = before[:, None, :, : scores.shape[-1]] & ~near[..., : scores.shape[-1]]
        return _attend(scores, values, seen)

    def _first_scores(self, q: Tensor, k: Tensor, v: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor]:
        """Scores [B, H, T, g] of the document's first g tokens (or fewer, in a shorter row) and their values,
        [B, g, H, d] or, for packed rows, [B, T, g, H, d]."""
        n_global = min(self.config.n_global, k.shape[1])
        if not seq.packed:
            return torch.einsum("bthd,bghd->bhtg", q, k[:, :n_global]) * self.scale, v[:, :n_global]
        start = torch.arange(k.shape[1], device=k.device) - seq.positions
        index = (start[:, :, None] + torch.arange(n_global, device=k.device)).clamp(max=k.shape[1] - 1)
        rows = torch.arange(k.shape[0], device=k.device)[:, None, None]
        return torch.einsum("bthd,btghd->bhtg", q, k[rows, index]) * self.scale, v[rows, index]

    def _global_rows(self, x: Tensor, seq: SeqInfo, o: Tensor) -> Tensor:
        """o with the rows of global tokens replaced by attention through projections of their own."""
        assert self.q_global is not None and self.k_global is not None and self.v_global is not None
        n_global = min(self.config.n_global, x.shape[1])
        part, own = x, seq
        if not seq.packed:
            part, own = x[:, :n_global], SeqInfo(seq.positions[:, :n_global])
        q, k, v = self._project(part, own, self.q_global, self.k_global, self.v_global)
        scores, values = self._first_scores(q, k, v, own)
        distance = own.positions[:, :, None] - torch.arange(scores.shape[-1], device=x.device)
        fresh, _ = _attend(self._biased(scores, distance), values, (distance >= 0)[:, None])
        fresh = F.pad(fresh, (0, 0, 0, 0, 0, x.shape[1] - fresh.shape[1]))
        return torch.where((seq.positions < self.config.n_global)[..., None, None], fresh.to(o.dtype), o)

    def _slopes(self, like: Tensor) -> Tensor:
        """[1, H]"""
        return torch.tensor([self.slopes], dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def _biased(self, scores: Tensor, distance: Tensor) -> Tensor:
        """scores [B, H, T, S] less each head's slope times the distance [B, T, S]."""
        if self.slopes is None:
            return scores
        slopes = self._slopes(scores)
        return scores.to(slopes.dtype) - slopes[..., None, None] * distance[:, None]

    def _near(self, distance: Tensor) -> Tensor:
        """Which of the distances [B, T, S] >= 0 lie in each head's window, [B, H, T, S]."""
        heads = self.config.n_heads // len(self.config.dilations)
        near = [
            (distance % dilation == 0) & (distance < self.config.window * dilation)
            for dilation in self.config.dilations
        ]
        return torch.stack(near, dim=1).repeat_interleave(heads, dim=1)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        counts = valid_counts(seq)
        q, k, v = self._project(x, seq, self.q, self.k, self.v)
        n_global = self.config.n_global

        def read(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            held = state[name]
            assert isinstance(held, KeyValueState | WindowState)
            keys, values, positions = held.append(k, v, counts)
            scores = torch.einsum("bthd,bshd->bhts", q, keys.to(q.dtype)) * self.scale
            distance = seq.positions[:, :, None] - positions[:, None]
            scores = self._biased(scores, distance)
            first = (positions < n_global)[:, None, None]
            seen = first if name == "global" else self._near(distance) | first
            seen = seen & ((distance >= 0) & (positions >= 0)[:, None])[:, None]
            return _attend(scores, values, seen)[0]

        o = read("window", q, k, v)
        if self.q_global is not None and self.k_global is not None and self.v_global is not None:
            fresh = read("global", *self._project(x, seq, self.q_global, self.k_global, self.v_global))
            o = torch.where((seq.positions < n_global)[..., None, None], fresh, o)
        return self.out(o.flatten(2).to(x.dtype))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        config = self.config

        def ring(window: int) -> DecodeState:
            if capacity <= window + config.n_global:
                return KVState(batch, capacity + n_tentative, config.n_heads, self.d_head, dtype=dtype, device=device)
            return WindowState(
                batch, window, config.n_heads, self.d_head,
                n_sinks=config.n_global, n_tentative=n_tentative, dtype=dtype, device=device,
            )  # fmt: skip

        parts = {"window": ring(config.span())}
        if config.global_projections:
            parts["global"] = ring(1)
        return CompositeState(parts)


def _dilated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    dilation: int,
    documents: Tensor | None,
    positions: Tensor,
    scale: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, d], log-sum-exp [B, T, H]) over every dilation-th token back, `window` of them."""
    if dilation == 1:
        return banded_attention(q, k, v, window, documents, scale=scale, slopes=slopes, positions=positions)
    batch, length = q.shape[:2]

    def apart(x: Tensor, value: float = 0) -> Tensor:
        """[B, T, ...] -> [B * dilation, T / dilation, ...]: tokens of the same remainder together."""
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -length % dilation), value=value)
        return x.unflatten(1, (-1, dilation)).transpose(1, 2).flatten(0, 1)

    segments = None if documents is None else apart(documents, -1)
    o, lse = banded_attention(
        apart(q), apart(k), apart(v), window, segments, scale=scale, slopes=slopes, positions=apart(positions)
    )

    def together(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, dilation)).transpose(1, 2).flatten(1, 2)[:, :length]

    return together(o), together(lse)


def _attend(scores: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, d], log-sum-exp [B, T, H]) of scores [B, H, T, S] where `seen`, values [B, S, H, d] or, by query,
    [B, T, S, H, d]."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide).masked_fill(~seen, HIDDEN)
    weights = scores.softmax(-1).to(values.dtype)
    o = torch.einsum("bhts,bshd->bthd" if values.dim() == 4 else "bhts,btshd->bthd", weights, values)
    return o, scores.logsumexp(-1).transpose(1, 2)
