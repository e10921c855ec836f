"""Softmax attention: multi-head, multi-query and grouped-query, with sliding windows, sinks, QK-norm and soft-cap."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels import dispatch
from kernels.attention import AttentionForm, AttentionQuery, Layout
from kernels.attention.spec import Mode as AttentionMode
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, NormConfig, TokenMixer, compute_dtype
from llm.blocks.linears.dense import project
from llm.blocks.norms import RMSNormConfig
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.init import Init, normal
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, KeyValueState, KVState, WindowState, valid_counts

Backend = Literal["auto", "sdpa", "flex", "flash", "blocked", "reference"]


@MIXERS.register(
    "attention",
    tiny=lambda: AttentionConfig(n_heads=2),
    paper="Vaswani et al. 2017",
    tinies={
        "gqa": lambda: AttentionConfig(n_heads=4, n_kv_heads=2),
        "mqa": lambda: AttentionConfig(n_heads=4, n_kv_heads=1, bias=True),
        "window": lambda: AttentionConfig(n_heads=2, window=5),
        "sinks": lambda: AttentionConfig(n_heads=2, n_kv_heads=1, window=5, n_sinks=2),
        "capped": lambda: AttentionConfig(n_heads=2, qk_norm=RMSNormConfig(), softcap=2.0),
        "persistent": lambda: AttentionConfig(
            n_heads=4, n_kv_heads=2, window=5, n_persistent=3, qk_norm=RMSNormConfig()
        ),
        "no_out": lambda: AttentionConfig(n_heads=2, out_proj=False),
    },
    about=About(
        equation="y_t = Σ_{s ≤ t} softmax_s(q_t · k_s / √d) v_s per head; keys and values shared by groups (GQA)",
        use="The baseline of every table, and the best recall per parameter while the context fits.",
        weakness="Quadratic compute and a cache that grows with the context; a window bounds both, and forgets.",
    ),
)
class AttentionConfig(MixerConfig):
    """Softmax attention.

    n_kv_heads: keys and values are shared among n_heads / n_kv_heads query heads (1: MQA; None: MHA).
    d_head: None for d_model / n_heads. bias: on all four projections; qkv_bias, out_bias override it.
    out_proj: false leaves out the output projection: the heads' outputs, together d_model wide, go out as they are.
    window: a token sees itself and window - 1 earlier ones, and besides the first n_sinks tokens of its document.
    n_persistent: learned tokens whose keys and values every query sees besides, without positions (Titans' persistent
    memory). qk_norm: normalises queries and keys over the head before positions act (Qwen3). softcap: scores become
    cap * tanh(score / cap) (Gemma 2). scale: of the scores; None for d_head^-0.5.
    backend: auto picks the fastest that can do all this on the device at hand.
    """

    n_heads: int = Field(ge=1)
    n_kv_heads: int | None = Field(None, ge=1)
    d_head: int | None = Field(None, ge=1)
    bias: bool = False
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    out_proj: bool = True
    window: int | None = Field(None, ge=1)
    n_sinks: int = Field(0, ge=0)
    n_persistent: int = Field(0, ge=0)
    qk_norm: NormConfig | None = None
    softcap: float | None = Field(None, gt=0)
    scale: float | None = Field(None, gt=0)
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _no_dead_keys(self) -> AttentionConfig:
        if self.n_sinks and self.window is None:
            raise UserError("attention: n_sinks has no effect without a window; set window or remove n_sinks")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise UserError(f"attention: n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if not self.out_proj and self.out_bias:
            raise UserError("attention: out_bias has no effect with out_proj: false; remove one of them")
        return self

    def resolved(self, d_model: int) -> tuple[int, int, int]:
        """(heads, key-value heads, head width)."""
        if self.d_head is None and d_model % self.n_heads:
            raise UserError(
                f"attention: d_model {d_model} is not divisible by n_heads {self.n_heads}; set d_head or change one"
            )
        d_head = self.d_head or d_model // self.n_heads
        if not self.out_proj and self.n_heads * d_head != d_model:
            raise UserError(
                f"attention: with out_proj: false the heads' outputs must be d_model {d_model} wide together, not "
                f"{self.n_heads} * {d_head}; remove d_head or set out_proj: true"
            )
        return self.n_heads, self.n_kv_heads or self.n_heads, d_head

    def biases(self) -> tuple[bool, bool]:
        """(q, k and v have one, the output projection has one)."""
        return (
            self.bias if self.qkv_bias is None else self.qkv_bias,
            self.bias if self.out_bias is None else self.out_bias,
        )

    def build(self, ctx: BuildCtx) -> Attention:
        return Attention(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        n_heads, n_kv_heads, d_head = self.resolved(dims.d_model)
        qkv_bias, out_bias = self.biases()
        d = dims.d_model
        parts = (
            dims.linear(d, n_heads * d_head, role="mixer.q", bias=qkv_bias)
            + dims.linear(d, n_kv_heads * d_head, role="mixer.k", bias=qkv_bias)
            + dims.linear(d, n_kv_heads * d_head, role="mixer.v", bias=qkv_bias)
        )
        if self.out_proj:
            parts = parts + dims.linear(n_heads * d_head, d, role="mixer.out", bias=out_bias)
        if self.qk_norm is not None:
            parts = parts + self.qk_norm.cost(d_head) + self.qk_norm.cost(d_head)
        seen = self.n_seen(seq_len + 1) - self.n_seen(seq_len) if mode == "decode" else self.n_seen(seq_len) / seq_len
        if self.n_persistent:
            learned = self.n_persistent * d
            again = sum(dims.linear(d, n_kv_heads * d_head, role=f"mixer.{name}").flops_per_token for name in "kv")
            share = self.n_persistent / (1 if mode == "decode" else seq_len)
            parts = parts + Cost(params=learned, active_params=learned, flops_per_token=again * share)
        scores = 4.0 * n_heads * d_head * (seen + self.n_persistent)
        kept = seq_len if self.window is None else min(seq_len, self.window + self.n_sinks)
        state = 2 * n_kv_heads * d_head * kept * dims.state_dtype_bytes
        return parts + Cost(flops_per_token=scores, attention_flops=scores, state_bytes_per_seq=state)

    def n_seen(self, n_tokens: int) -> int:
        """Visible (query, key) pairs among the first n_tokens tokens of a document."""

        def pairs(n: int, most: int | None) -> int:
            """Sum of min(t, most) over t = 1..n."""
            full = n if most is None else min(n, most)
            return full * (full + 1) // 2 + (n - full) * (most or 0)

        if self.window is None:
            return pairs(n_tokens, None)
        behind = max(0, n_tokens - self.window)
        return pairs(n_tokens, self.window) + (pairs(behind, self.n_sinks) if self.n_sinks else 0)


class Attention(TokenMixer):
    """q [D -> H * Dh], k and v [D -> Hkv * Dh], out [H * Dh -> D] or nothing, persistent [P, D] or nothing."""

    caps = Caps(rollback="free", needs_positions=True)

    def __init__(self, config: AttentionConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.resolved(ctx.d_model)
        qkv_bias, out_bias = config.biases()
        self.q = ctx.linear(ctx.d_model, self.n_heads * self.d_head, role="mixer.q", bias=qkv_bias)
        self.k = ctx.linear(ctx.d_model, self.n_kv_heads * self.d_head, role="mixer.k", bias=qkv_bias)
        self.v = ctx.linear(ctx.d_model, self.n_kv_heads * self.d_head, role="mixer.v", bias=qkv_bias)
        self.out: nn.Module = nn.Identity()
        if config.out_proj:
            self.out = ctx.linear(self.n_heads * self.d_head, ctx.d_model, role="mixer.out", bias=out_bias)
        self.q_norm = config.qk_norm.build(self.d_head) if config.qk_norm is not None else None
        self.k_norm = config.qk_norm.build(self.d_head) if config.qk_norm is not None else None
        self.persistent: nn.Parameter | None = None
        if config.n_persistent:
            self.persistent = nn.Parameter(torch.empty(config.n_persistent, ctx.d_model))
        self.position = ctx.position()
        self.position.for_heads(self.d_head)
        slopes = self.position.slopes(self.n_heads)
        self.form = AttentionForm(
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
            scale=config.scale if config.scale is not None else self.d_head**-0.5,
            window=config.window,
            n_sinks=config.n_sinks,
            n_persistent=config.n_persistent,
            softcap=config.softcap,
            slopes=None if slopes is None else tuple(slopes.tolist()),
        )
        self.backend = None if config.backend == "auto" else config.backend
        self.key = f"attention/{self.backend}/{self.form.mask_key()}"
        self._check_backend()

    def init_spec(self) -> dict[str, Init]:
        return {} if self.persistent is None else {"persistent": normal(1.0)}

    def _check_backend(self) -> None:
        """UserError when the backend that the config names can do this on no device."""
        if self.backend is None:
            return
        reasons = set()
        for device in ("cuda", "cpu"):
            for dtype in (torch.bfloat16, torch.float32):
                query = AttentionQuery(device, dtype, self.form, "causal", grad=False)
                answer = dispatch.op("attention").impls[self.backend].supports(query)
                if answer is True:
                    return
                reasons.add(str(answer))
        raise UserError(
            f"attention.backend {self.backend!r} cannot be used: {'; '.join(sorted(reasons))}; use backend: auto"
        )

    def implementation(self, device: torch.device, dtype: torch.dtype, mode: AttentionMode) -> Any:
        """The implementation in use; keys of a decode state are served by `auto` when the named backend cannot."""
        query = AttentionQuery(device.type, dtype, self.form, mode, grad=torch.is_grad_enabled())
        backend = self.backend
        if mode == "positions" and backend not in ("sdpa", "reference"):
            backend = None
        try:
            return dispatch.resolve("attention", query, backend=backend)
        except dispatch.Unsupported as error:
            raise UserError(str(error)) from None

    def kernel_requests(self, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Any]]:
        """What the self-test of kernels must cover."""
        modes: tuple[AttentionMode, ...] = ("causal", "packed", "positions")
        return [
            ("attention", AttentionQuery(device.type, dtype, self.form, mode, grad=mode != "positions"))
            for mode in modes
        ]

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        dtype = compute_dtype(seq.positions.device, dtype)
        self.position.prepare(seq, dtype)
        if seq.positions.shape[1] > 1:
            self._prepared(seq, dtype)

    def _prepared(self, seq: SeqInfo, dtype: torch.dtype) -> tuple[Any, Any]:
        """(implementation, its masks) for a whole sequence, once per forward for all layers of the same form."""
        key = f"{self.key}/{dtype}/{torch.is_grad_enabled()}"
        found = seq.derived.get(key)
        if found is None:
            layout = Layout(
                positions=seq.positions,
                documents=seq.document_ids() if seq.packed else None,
                cu_seqlens=seq.cu_seqlens,
                max_seqlen=seq.max_seqlen,
            )
            implementation = self.implementation(seq.positions.device, dtype, layout.mode)
            found = seq.derived[key] = (implementation, implementation.prepare(layout, self.form, dtype))
        return found

    def _project(self, x: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (-1, self.d_head)) for y in project(x, self.q, self.k, self.v))
        q, k = self.position.at_qk(*self.before_positions(q, k), seq)
        return q, k, v

    def _after_persistent(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, Hkv, Dh], those of the persistent tokens in front."""
        if self.persistent is None:
            return k, v
        own_k, own_v = (
            y.unflatten(-1, (-1, self.d_head))[None] for y in project(self.persistent.to(k.dtype), self.k, self.v)
        )
        own_k = self.before_positions(own_k.new_zeros(*own_k.shape[:2], self.n_heads, self.d_head), own_k)[1]
        pairs = ((own_k, k), (own_v, v))
        k, v = (torch.cat([own.to(y.dtype).expand(len(y), -1, -1, -1), y], dim=1) for own, y in pairs)
        return k, v

    def before_positions(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What queries [B, T, H, Dh] and keys [B, T, Hkv, Dh] become before positions act on them."""
        if self.q_norm is not None and self.k_norm is not None:
            return self.q_norm(q), self.k_norm(k)
        return q, k

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        q, k, v = self._project(x, seq)
        k, v = self._after_persistent(k, v)
        implementation, prepared = self._prepared(seq, q.dtype)
        return self.out(implementation.run(q, k, v, self.form, prepared).flatten(2))

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, KeyValueState | WindowState)
        q, k, v = self._project(x, seq)
        k, v, positions = state.append(k, v, valid_counts(seq))
        k, v = self._after_persistent(k.to(q.dtype), v.to(q.dtype))
        implementation = self.implementation(x.device, q.dtype, "positions")
        # All layers have seen the same tokens, so their states of one kind and size hold them at the same places.
        key = f"{self.key}/{state.arrangement}/{q.dtype}"
        prepared = seq.derived.get(key)
        if prepared is None:
            full = isinstance(state, KeyValueState) and seq.valid is None and state.full(x.shape[1])
            layout = Layout(seq.positions, k_positions=positions, full=full)
            prepared = implementation.prepare(layout, self.form, q.dtype)
            seq.derived[key] = prepared
        return self.out(implementation.run(q, k, v, self.form, prepared).flatten(2))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        window, n_sinks = self.form.window, self.form.n_sinks
        if window is None or capacity <= window + n_sinks:
            return KVState(batch, capacity + n_tentative, self.n_kv_heads, self.d_head, dtype=dtype, device=device)
        return WindowState(
            batch,
            window,
            self.n_kv_heads,
            self.d_head,
            n_sinks=n_sinks,
            n_tentative=n_tentative,
            dtype=dtype,
            device=device,
        )
