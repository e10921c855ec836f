"""Correct mixers that exist for the tests alone, one per way of remembering that the trunk's attention does not use.

They stand in a registry of their own, hence no config or document sees them. They pass every contract, and the
deliberately broken ones of `test_suites_can_fail.py` derive from them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm.blocks.base import BuildCtx, Caps, MixerConfig, TokenMixer
from llm.core.cost import Cost, Dims, Mode
from llm.core.init import Init, normal
from llm.core.registry import Registry
from llm.core.seq import SeqInfo
from llm.core.state import ConvState, DecodeState, RecurrentState, valid_counts

EXAMPLES: Registry[MixerConfig] = Registry("example mixer")


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _real(seq: SeqInfo, like: Tensor) -> tuple[Tensor, Tensor]:
    """([B, T] bool: real tokens, [B] how many)."""
    counts = valid_counts(seq)
    if seq.valid is None or counts is None:
        counts = torch.full(like.shape[:1], like.shape[1], dtype=torch.int64, device=like.device)
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device), counts
    return seq.valid, counts


@EXAMPLES.register("gated_recurrence", tiny=lambda: GatedRecurrenceConfig(), paper="test only")
class GatedRecurrenceConfig(MixerConfig):
    """S_t = g_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, per head; S [H, d, d]."""

    n_heads: int = 2
    d_head: int = 4

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return GatedRecurrence(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d, inner = dims.d_model, self.n_heads * self.d_head
        cost = sum((dims.linear(d, inner, role=f"mixer.{name}") for name in "qkv"), Cost())
        cost = (
            cost + dims.linear(d, self.n_heads, role="mixer.gate", bias=True) + dims.linear(inner, d, role="mixer.out")
        )
        elements = self.n_heads * self.d_head**2
        return cost + Cost(
            flops_per_token=5.0 * elements, state_bytes_per_seq=elements * max(4, dims.state_dtype_bytes)
        )


class GatedRecurrence(TokenMixer):
    """q, k, v [D -> H d], gate [D -> H]; replays its factors on rollback."""

    caps = Caps(rollback="replay")

    def __init__(self, config: GatedRecurrenceConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        inner = self.n_heads * self.d_head
        self.q = ctx.linear(ctx.d_model, inner, role="mixer.q")
        self.k = ctx.linear(ctx.d_model, inner, role="mixer.k")
        self.v = ctx.linear(ctx.d_model, inner, role="mixer.v")
        self.gate = ctx.linear(ctx.d_model, self.n_heads, role="mixer.gate", bias=True)
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out")

    def factors(self, x: Tensor, seq: SeqInfo) -> dict[str, Tensor]:
        """k, v [B, T, H, d] and g [B, T, H]; a new document forgets, padding changes nothing."""
        real, _ = _real(seq, x)
        k, v = (f(x).unflatten(-1, (self.n_heads, self.d_head)) for f in (self.k, self.v))
        g = torch.sigmoid(self.gate(x) + 2.0)
        g = torch.where(seq.starts()[..., None], 0.0, g)
        return {"k": torch.where(real[..., None, None], k, 0.0), "v": v, "g": torch.where(real[..., None], g, 1.0)}

    @staticmethod
    def one(s: Tensor, f: dict[str, Tensor], t: int) -> Tensor:
        """S [B, H, d, d] after token t."""
        return f["g"][:, t, :, None, None] * s + f["k"][:, t, :, :, None] * f["v"][:, t, :, None, :]

    def scan(self, x: Tensor, f: dict[str, Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, D] and the last S."""
        q = self.q(x).unflatten(-1, (self.n_heads, self.d_head))
        outputs = []
        for t in range(x.shape[1]):
            s = self.one(s, f, t)
            outputs.append(torch.einsum("bhd,bhde->bhe", q[:, t].to(s.dtype), s))
        return self.out(torch.stack(outputs, dim=1).flatten(2).to(x.dtype)), s

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        zero = x.new_zeros(x.shape[0], self.n_heads, self.d_head, self.d_head, dtype=_state_dtype(x.dtype))
        return self.scan(x, self.factors(x, seq), zero)[0]

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, RecurrentState)
        factors = self.factors(x, seq)
        y, s = self.scan(x, factors, state.read()["s"])
        state.write({"s": s}, _real(seq, x)[1], factors=factors)
        return y

    def replay(self, tensors: dict[str, Tensor], factors: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        """The state after the first counts[b] tokens."""
        s = tensors["s"]
        for t in range(factors["k"].shape[1]):
            s = torch.where((t < counts)[:, None, None, None], self.one(s, factors, t), s)
        return {"s": s}

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        h, d = self.n_heads, self.d_head
        return RecurrentState(
            batch,
            {"s": (h, d, d)},
            n_tentative=n_tentative,
            policy="replay",
            factors={"k": (h, d), "v": (h, d), "g": (h,)},
            update=self.replay,
            dtype=_state_dtype(dtype),
            device=device,
        )


@EXAMPLES.register("leaky_integrator", tiny=lambda: LeakyIntegratorConfig(), paper="test only")
class LeakyIntegratorConfig(MixerConfig):
    """h_t = a h_{t-1} + (1 - a) u_t, channel by channel."""

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return LeakyIntegrator(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d = dims.d_model
        cost = dims.linear(d, d, role="mixer.in") + dims.linear(d, d, role="mixer.out")
        own = Cost(
            params=d, active_params=d, flops_per_token=3.0 * d, state_bytes_per_seq=d * max(4, dims.state_dtype_bytes)
        )
        return cost + own


class LeakyIntegrator(TokenMixer):
    """decay [D]; keeps a copy of its state per tentative token."""

    caps = Caps(rollback="copies")

    def __init__(self, config: LeakyIntegratorConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.d_model = ctx.d_model
        self.input = ctx.linear(ctx.d_model, ctx.d_model, role="mixer.in")
        self.out = ctx.linear(ctx.d_model, ctx.d_model, role="mixer.out")
        self.decay = nn.Parameter(torch.empty(ctx.d_model))

    def init_spec(self) -> dict[str, Init]:
        return {"decay": normal(1.0)}

    def scan(self, x: Tensor, seq: SeqInfo, h: Tensor) -> Tensor:
        """h [B, T, D] after each token."""
        u, a = self.input(x).to(h.dtype), torch.sigmoid(self.decay).to(h.dtype)
        keep = torch.where(seq.starts()[..., None], 0.0, a)
        real, _ = _real(seq, x)
        states = []
        for t in range(x.shape[1]):
            h = torch.where(real[:, t, None], keep[:, t] * h + (1 - a) * u[:, t], h)
            states.append(h)
        return torch.stack(states, dim=1)

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        zero = x.new_zeros(x.shape[0], self.d_model, dtype=_state_dtype(x.dtype))
        return self.out(self.scan(x, seq, zero).to(x.dtype))

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, RecurrentState)
        each = self.scan(x, seq, state.read()["h"])
        state.write({"h": each[:, -1]}, _real(seq, x)[1], each={"h": each})
        return self.out(each.to(x.dtype))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        shapes = {"h": (self.d_model,)}
        return RecurrentState(
            batch, shapes, n_tentative=n_tentative, policy="copies", dtype=_state_dtype(dtype), device=device
        )


@EXAMPLES.register(
    "short_convolution",
    tiny=lambda: ShortConvolutionConfig(),
    tinies={"two_taps": lambda: ShortConvolutionConfig(width=2)},
    paper="test only",
)
class ShortConvolutionConfig(MixerConfig):
    """y_t = sum over j < width of w_j u_{t-j}, channel by channel, within the document."""

    width: int = 4

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return ShortConvolution(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d = dims.d_model
        cost = dims.linear(d, d, role="mixer.in") + dims.linear(d, d, role="mixer.out")
        taps, state = self.width * d, (self.width - 1) * d * dims.state_dtype_bytes
        return cost + Cost(params=taps, active_params=taps, flops_per_token=2.0 * taps, state_bytes_per_seq=state)


class ShortConvolution(TokenMixer):
    """taps [width, D]."""

    caps = Caps(rollback="free")

    def __init__(self, config: ShortConvolutionConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.width, self.d_model = config.width, ctx.d_model
        self.input = ctx.linear(ctx.d_model, ctx.d_model, role="mixer.in")
        self.out = ctx.linear(ctx.d_model, ctx.d_model, role="mixer.out")
        self.taps = nn.Parameter(torch.empty(config.width, ctx.d_model))

    def init_spec(self) -> dict[str, Init]:
        return {"taps": normal(self.width**-0.5)}

    def convolve(self, history: Tensor, seq: SeqInfo) -> Tensor:
        """history [B, width - 1 + T, D] -> [B, T, D]; a tap that reaches before the document's start gives nothing."""
        length = history.shape[1] - self.width + 1
        total = torch.zeros_like(history[:, :length])
        for j in range(self.width):
            past = history[:, self.width - 1 - j : self.width - 1 - j + length]
            total = total + torch.where((seq.positions >= j)[..., None], past, 0.0) * self.taps[j]
        return self.out(total)

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self.convolve(nn.functional.pad(self.input(x), (0, 0, self.width - 1, 0)), seq)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, ConvState)
        return self.convolve(state.append(self.input(x), valid_counts(seq)).to(x.dtype), seq)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        return ConvState(batch, self.width, self.d_model, n_tentative=n_tentative, dtype=dtype, device=device)
