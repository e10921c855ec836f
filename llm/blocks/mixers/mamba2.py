"""Mamba-2 (Dao and Gu 2024): a selective state space whose transition is one number per head, as linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels.linear_attention import LinearAttentionQuery, linear_attention
from kernels.rms_norm import rms_norm
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.linears.dense import project_joined
from llm.blocks.recurrence import extend, linear_attention_cost, matrix_state
from llm.blocks.short_conv import ShortConvolution, short_conv_cost
from llm.blocks.time_step import Interval, TimeStep
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState, RecurrentState
from llm.core.states.recurrent import Tensors


@MIXERS.register(
    "mamba2",
    tiny=lambda: Mamba2Config(d_state=8, d_head=16, chunk=8),
    paper="arXiv:2405.21060",
    status="experimental",
    tinies={
        "groups": lambda: Mamba2Config(d_state=6, d_head=8, n_groups=2, chunk=5, conv_width=3),
        "biases": lambda: Mamba2Config(d_state=8, d_head=32, expand=1, bias=True, conv_bias=False, chunk=8),
    },
    about=About(
        equation="S_t = exp(−e^A dt_t) S_{t−1} + B_t (dt_t x_t)ᵀ, y_t = C_t S_t + D x_t, dt_t = softplus(W x_t + b)",
        use="A whole layer without a feed-forward part; each token decides how much it writes and how much is kept.",
        weakness="It only adds to its state, so entries blur into one another; exact recall needs another rule.",
    ),
)
class Mamba2Config(MixerConfig):
    """Mamba-2 (SSD).

    d_state: N, width of B and C, which play keys and queries. d_head: P, width of a head's inputs. expand: inner width
    over d_model; the number of heads is expand * d_model / d_head. n_groups: B and C are shared by the heads of a
    group. conv_width, conv_bias: the short convolution on x, B and C. bias: of the linear maps. norm_eps: of the gated
    norm before the output, which is taken over each group. dt_range, rate_range: at the start, time steps are
    log-uniform in the first and rates e^A uniform in the second. chunk: tokens per chunk.
    """

    d_state: int = Field(128, ge=1)
    d_head: int = Field(64, ge=1)
    expand: int = Field(2, ge=1)
    n_groups: int = Field(1, ge=1)
    conv_width: int = Field(4, ge=1)
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float = Field(1e-5, gt=0)
    dt_range: Interval = (0.001, 0.1)
    rate_range: Interval = (1.0, 16.0)
    chunk: int = Field(64, ge=1)

    def n_heads(self, d_model: int) -> int:
        """Number of heads."""
        inner = self.expand * d_model
        if inner % self.d_head:
            raise UserError(
                f"mamba2: expand * d_model = {inner} is not divisible by d_head {self.d_head}; change one of them"
            )
        if inner // self.d_head % self.n_groups:
            raise UserError(
                f"mamba2: {inner // self.d_head} heads (expand * d_model / d_head) cannot form n_groups "
                f"{self.n_groups}; change one of them"
            )
        return inner // self.d_head

    def projections(self, d_model: int) -> dict[str, int]:
        """Widths of the linear maps of the input by name, in the order in which they are computed."""
        inner, keys = self.expand * d_model, self.n_groups * self.d_state
        return {"x": inner, "b": keys, "c": keys, "dt": self.n_heads(d_model), "gate": inner}

    def build(self, ctx: BuildCtx) -> Mamba2:
        return Mamba2(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d, widths, n_heads = dims.d_model, self.projections(dims.d_model), self.n_heads(dims.d_model)
        inner, state = widths["x"], dims.state_dtype_bytes
        linears = (dims.linear(d, width, role=f"mixer.{name}", bias=self.bias) for name, width in widths.items())
        own = inner + 3 * n_heads  # the norm's weight, and per head dt_bias, a_log and the skip
        return (
            sum(linears, Cost())
            + dims.linear(inner, d, role="mixer.out", bias=self.bias)
            + short_conv_cost(inner + widths["b"] + widths["c"], self.conv_width, self.conv_bias, state)
            + Cost(params=own, active_params=own, flops_per_token=2.0 * inner)
            + linear_attention_cost(
                n_heads,
                self.d_state,
                self.d_head,
                chunk=self.chunk,
                seq_len=seq_len,
                mode=mode,
                state_dtype_bytes=state,
                n_groups=self.n_groups,
            )
        )


class Mamba2(TokenMixer):
    """x, gate [D -> H P], b, c [D -> G N], dt [D -> H], conv over x, b and c, skip [H], norm, out [H P -> D].

    The linear maps are the official input projection in parts. The state holds the last inputs of the convolution and
    S [H, N, P].
    """

    caps = Caps(rollback="replay")

    def __init__(self, config: Mamba2Config, ctx: BuildCtx) -> None:
        super().__init__()
        self.n_heads, self.n_groups, self.chunk = config.n_heads(ctx.d_model), config.n_groups, config.chunk
        self.d_state, self.d_head = config.d_state, config.d_head
        self.widths = config.projections(ctx.d_model)
        for name, width in self.widths.items():
            self.add_module(name, ctx.linear(ctx.d_model, width, role=f"mixer.{name}", bias=config.bias))
        n_channels = sum(self.widths[name] for name in "xbc")
        self.conv = ShortConvolution(n_channels, config.conv_width, bias=config.conv_bias)
        self.time_step = TimeStep(self.n_heads, config.dt_range, config.rate_range)
        self.skip = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedGroupNorm(self.widths["x"], config.n_groups, config.norm_eps)
        self.out = ctx.linear(self.widths["x"], ctx.d_model, role="mixer.out", bias=config.bias)

    def init_spec(self) -> dict[str, Init]:
        return {"skip": constant(1.0)}

    def kernel_requests(self, device: torch.device, dtype: torch.dtype) -> list[tuple[str, LinearAttentionQuery]]:
        """What the self-test of kernels must cover."""
        return [("linear_attention", LinearAttentionQuery(device.type, dtype, True))]

    def scan(
        self, q: Tensor, factors: Tensors, state: Tensor | None, *, valid: Tensor | None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(outputs [B, T, H, P], S after the last real token)."""
        return linear_attention(q, factors["k"], factors["v"], factors["log_decay"], starts, state, valid, self.chunk)

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        inputs, dt, gate = self._project(x)
        c, u, factors = self._factors(self.conv(inputs, seq), dt)
        y, _ = self.scan(c, factors, None, valid=None, starts=seq.starts() if seq.packed else None)
        return self._leave(y, u, gate)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        conv_state, memory = state["conv"], state["memory"]
        assert isinstance(conv_state, ConvState) and isinstance(memory, RecurrentState)
        inputs, dt, gate = self._project(x)
        c, u, factors = self._factors(self.conv.extend(inputs, seq, conv_state), dt)
        return self._leave(extend(self.scan, c, factors, seq, memory), u, gate)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, B and C beside one another [B, T, H P + 2 G N], raw time steps [B, T, H], gate [B, T, H P])."""
        linears = [self.get_submodule(name) for name in self.widths]
        joined = project_joined(x, *linears)
        if joined is None:
            joined = torch.cat([linear(x) for linear in linears], dim=-1)
        inner, b, c, dt, gate = self.widths.values()
        inputs, dt_raw, gates = joined.split([inner + b + c, dt, gate], dim=-1)
        return inputs, dt_raw, gates

    def _factors(self, inputs: Tensor, dt_raw: Tensor) -> tuple[Tensor, Tensor, Tensors]:
        """(C [B, T, G, N], convolved x [B, T, H, P], {"k": B [B, T, G, N], "v": dt x, "log_decay": [B, T, H]})."""
        x, b, c = inputs.split([self.widths[name] for name in "xbc"], dim=-1)
        x = x.unflatten(-1, (-1, self.d_head))
        b, c = (part.unflatten(-1, (-1, self.d_state)) for part in (b, c))
        dt, log_decay = self.time_step(dt_raw)
        return c, x, {"k": b, "v": (x * dt[..., None]).to(x.dtype), "log_decay": log_decay}

    def _leave(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """y, x [B, T, H, P], gate [B, T, H P] -> [B, T, D]."""
        y = (y + x * self.skip[:, None]).to(gate.dtype)
        return self.out(self.norm(y.flatten(2), gate))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        h, n, p = self.n_heads, self.d_state, self.d_head
        factors = {"k": (self.n_groups, n), "v": (h, p), "log_decay": (h,)}
        memory = matrix_state(self.scan, batch, (h, n, p), factors, n_tentative=n_tentative, dtype=dtype, device=device)
        conv = self.conv.new_state(batch, n_tentative=n_tentative, dtype=dtype, device=device)
        return CompositeState({"memory": memory, "conv": conv})


class GatedGroupNorm(nn.Module):
    """RMSNorm over each of n_groups parts of y * silu(gate), then weight [C]."""

    def __init__(self, width: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def init_spec(self) -> dict[str, Init]:
        return {"weight": constant(1.0)}

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y, gate [B, T, C] -> [B, T, C]."""
        y = y * F.silu(gate)
        if self.n_groups == 1:
            return rms_norm(y, self.weight, self.eps)
        normed = rms_norm(y.unflatten(-1, (self.n_groups, -1)), None, self.eps).flatten(-2)
        return (normed * self.weight).to(y.dtype)
