"""Retention (Sun et al. 2023, RetNet): linear attention with a fixed decay per head, normalised and gated."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels.linear_attention import LinearAttentionQuery, linear_attention
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, NormConfig, PositionEncoding, TokenMixer, compute_dtype
from llm.blocks.linears.dense import project
from llm.blocks.norms import LayerNormConfig, RMSNormConfig
from llm.blocks.recurrence import extend, linear_attention_cost, matrix_state
from llm.blocks.rope import RopeConfig
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, RecurrentState
from llm.core.states.recurrent import Tensors

_TINY_NORM = RMSNormConfig(eps=1e-2, affine=False)
"""A large eps for tiny configs: so narrow heads put out next to nothing for some first tokens, and norms blow it up."""


@MIXERS.register(
    "retention",
    tiny=lambda: RetentionConfig(n_heads=2, chunk=8, head_norm=_TINY_NORM),
    paper="arXiv:2307.08621",
    status="experimental",
    tinies={
        "paper": lambda: RetentionConfig(
            n_heads=2,
            d_key=8,
            d_value=5,
            decay="log_linear",
            rotation="position",
            head_norm=LayerNormConfig(affine=False, bias=False, eps=1e-2),
            chunk=8,
        ),
        "plain": lambda: RetentionConfig(
            n_heads=1, d_value=8, rotation="none", xavier_init=True, chunk=5, head_norm=_TINY_NORM
        ),
    },
    about=About(
        equation="S_t = γ S_{t−1} + k_t v_tᵀ, y_t = W_out (silu(W_gate x_t) ⊙ norm(q_t S_t)), γ = 1 − 2^(−5−head)",
        use="Long contexts at constant memory: linear-time training by chunks, and decoding at one price per token.",
        weakness="Decays are fixed, so it cannot choose what to keep: recall of many exact pairs is poor.",
    ),
)
class RetentionConfig(MixerConfig):
    """Retention.

    d_key, d_value: widths per head; None for d_model / n_heads and twice that. decay: "powers" gives head h the decay
    1 - 2^(-5-h) (the official code), "log_linear" 1 - exp(e_h) with e_h evenly spaced from ln 1/32 to ln 1/512 (the
    paper). rotation of queries and keys: "theta_shift" turns channel pair j by position * 10000^(-j / (d_key/2 - 1))
    (the official code), "position" takes the model's position encoding, "none" leaves them.
    head_norm: over each head's output; LayerNorm makes it the group norm of the paper. xavier_init: the official start
    (uniform, gain 2^-2.5, and 2^-1 for the output projection) instead of the model's own. chunk: tokens per chunk.
    """

    n_heads: int = Field(ge=1)
    d_key: int | None = Field(None, ge=1)
    d_value: int | None = Field(None, ge=1)
    decay: Literal["powers", "log_linear"] = "powers"
    rotation: Literal["theta_shift", "position", "none"] = "theta_shift"
    head_norm: NormConfig = RMSNormConfig(eps=1e-6, affine=False)
    xavier_init: bool = False
    chunk: int = Field(64, ge=1)

    def resolved(self, d_model: int) -> tuple[int, int]:
        """(key width, value width) per head."""
        if self.d_key is None and d_model % self.n_heads:
            raise UserError(
                f"retention: d_model {d_model} is not divisible by n_heads {self.n_heads}; set d_key or change one"
            )
        d_key = self.d_key or d_model // self.n_heads
        if self.rotation == "theta_shift" and d_key % 2:
            raise UserError(f"retention: theta_shift turns pairs of channels, so d_key {d_key} must be even; change it")
        return d_key, self.d_value or 2 * d_key

    def build(self, ctx: BuildCtx) -> Retention:
        return Retention(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d, (d_key, d_value) = dims.d_model, self.resolved(dims.d_model)
        keys, values = self.n_heads * d_key, self.n_heads * d_value
        return (
            dims.linear(d, keys, role="mixer.q")
            + dims.linear(d, keys, role="mixer.k")
            + dims.linear(d, values, role="mixer.v")
            + dims.linear(d, values, role="mixer.gate")
            + dims.linear(values, d, role="mixer.out")
            + self.head_norm.cost(d_value)
            + linear_attention_cost(
                self.n_heads,
                d_key,
                d_value,
                chunk=self.chunk,
                seq_len=seq_len,
                mode=mode,
                state_dtype_bytes=dims.state_dtype_bytes,
            )
        )


class Retention(TokenMixer):
    """q, k [D -> H K], v, gate [D -> H V], out [H V -> D]; the state is S [H, K, V]."""

    caps = Caps(rollback="replay", needs_positions=True)

    def __init__(self, config: RetentionConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.n_heads, self.decay, self.chunk = config.n_heads, config.decay, config.chunk
        self.d_key, self.d_value = config.resolved(ctx.d_model)
        keys, values = self.n_heads * self.d_key, self.n_heads * self.d_value
        linear = partial(_xavier, ctx) if config.xavier_init else ctx.linear
        self.q = linear(ctx.d_model, keys, role="mixer.q")
        self.k = linear(ctx.d_model, keys, role="mixer.k")
        self.v = linear(ctx.d_model, values, role="mixer.v")
        self.gate = linear(ctx.d_model, values, role="mixer.gate")
        self.out = linear(values, ctx.d_model, role="mixer.out")
        self.head_norm = config.head_norm.build(self.d_value)
        self.position: PositionEncoding | None = None
        if config.rotation == "theta_shift":
            self.position = theta_shift(self.d_key).build(ctx)
        elif config.rotation == "position":
            self.position = ctx.position()
        if self.position is not None:
            self.position.for_heads(self.d_key)

    def kernel_requests(self, device: torch.device, dtype: torch.dtype) -> list[tuple[str, LinearAttentionQuery]]:
        """What the self-test of kernels must cover."""
        return [("linear_attention", LinearAttentionQuery(device.type, dtype, True))]

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        if self.position is not None:
            self.position.prepare(seq, compute_dtype(seq.positions.device, dtype))

    def log_decays(self, device: torch.device) -> Tensor:
        """[H] fp64, computed from the index of the head: kept out of parameters and buffers, a bf16 model has them in
        full."""
        head = torch.arange(self.n_heads, dtype=torch.float64, device=device)
        if self.decay == "powers":
            return torch.log1p(-torch.exp2(-5.0 - head))
        first, last = math.log(1 / 32), math.log(1 / 512)
        return torch.log1p(-torch.exp(first + (last - first) * head / max(1, self.n_heads - 1)))

    def retain(
        self, q: Tensor, factors: Tensors, state: Tensor | None, *, valid: Tensor | None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(outputs [B, T, H, V], S after the last real token)."""
        k, v = factors["k"], factors["v"]
        decays = self.log_decays(q.device)
        return linear_attention(q, k, v, decays, starts, state, valid, self.chunk)

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        q, factors, gate = self._project(x, seq)
        y, _ = self.retain(q, factors, None, valid=None, starts=seq.starts() if seq.packed else None)
        return self._leave(y, gate)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, RecurrentState)
        q, factors, gate = self._project(x, seq)
        return self._leave(extend(self.retain, q, factors, seq, state), gate)

    def _project(self, x: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensors, Tensor]:
        """(q [B, T, H, K], {"k", "v": the same with V}, gate [B, T, H V])."""
        q, k, v, gate = project(x, self.q, self.k, self.v, self.gate)
        q, k = q.unflatten(-1, (-1, self.d_key)), k.unflatten(-1, (-1, self.d_key))
        if self.position is not None:
            q, k = self.position.at_qk(q, k, seq)
        return q, {"k": k * self.d_key**-0.5, "v": v.unflatten(-1, (-1, self.d_value))}, gate

    def _leave(self, y: Tensor, gate: Tensor) -> Tensor:
        """y [B, T, H, V], gate [B, T, H V] -> [B, T, D]."""
        return self.out(F.silu(gate) * self.head_norm(y.to(gate.dtype)).flatten(2))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        h, k, v = self.n_heads, self.d_key, self.d_value
        factors = {"k": (h, k), "v": (h, v)}
        return matrix_state(self.retain, batch, (h, k, v), factors, n_tentative=n_tentative, dtype=dtype, device=device)


def theta_shift(d_key: int) -> RopeConfig:
    """The official rotation: pairs of neighbouring channels turn by position * 10000^(-j / (d_key/2 - 1)).

    Rotary rates are theta^(-j / (d_key/2)): the same with another theta.
    """
    pairs = d_key // 2
    return RopeConfig(theta=10000.0 ** (pairs / max(1, pairs - 1)), interleaved=True)


def _xavier(ctx: BuildCtx, d_in: int, d_out: int, *, role: str) -> nn.Module:
    """A linear whose weights start Xavier-uniform with the official gains."""
    gain = 0.5 if role == "mixer.out" else 2.0**-2.5
    std = gain * math.sqrt(2.0 / (d_in + d_out))
    init = ctx.init.model_copy(update={"distribution": "uniform"})
    return ctx.linear_config(role).build(d_in, d_out, bias=False, std=std, init=init)
