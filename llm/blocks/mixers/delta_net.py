"""DeltaNet (Yang et al. 2024) and Gated DeltaNet (Yang et al. 2025): states that are corrected rather than added to."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kernels.delta_rule import DeltaRuleQuery, delta_rule
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, NormConfig, TokenMixer
from llm.blocks.linears.dense import project_joined
from llm.blocks.norms import RMSNormConfig
from llm.blocks.recurrence import delta_rule_cost, extend, matrix_state
from llm.blocks.short_conv import ShortConvolution, short_conv_cost
from llm.blocks.time_step import Interval, TimeStep
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState, RecurrentState
from llm.core.states.recurrent import Tensors

L2_EPS = 1e-6
_TINY_NORM = RMSNormConfig(eps=1e-2)
"""A large eps for tiny configs: so narrow heads put out next to nothing for some first tokens, and norms blow it up."""


class DeltaConfig(MixerConfig):
    """Fields, widths and costs that both mixers have; the registered classes document the fields."""

    values_per_key: ClassVar[int] = 1
    decays: ClassVar[bool] = False

    n_heads: int = Field(ge=1)
    n_value_heads: int | None = Field(None, ge=1)
    d_key: int | None = Field(None, ge=1)
    d_value: int | None = Field(None, ge=1)
    conv_width: int | None = Field(4, ge=1)
    gate: bool = False
    negative_eigenvalues: bool = False
    head_norm: NormConfig = RMSNormConfig(eps=1e-5)
    chunk: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _whole_groups(self) -> DeltaConfig:
        if self.n_value_heads is not None and self.n_value_heads % self.n_heads:
            raise UserError(
                f"{self.type_name}: n_value_heads {self.n_value_heads} must be a multiple of n_heads {self.n_heads}"
            )
        return self

    def resolved(self, d_model: int) -> tuple[int, int, int]:
        """(value heads, key width, value width)."""
        if self.d_key is None and d_model % self.n_heads:
            raise UserError(
                f"{self.type_name}: d_model {d_model} is not divisible by n_heads {self.n_heads}; "
                "set d_key or change one"
            )
        d_key = self.d_key or d_model // self.n_heads
        return self.n_value_heads or self.n_heads, d_key, self.d_value or self.values_per_key * d_key

    def projections(self, d_model: int) -> dict[str, int]:
        """Widths of the linear maps of the input by name, in the order in which they are computed."""
        n_values, d_key, d_value = self.resolved(d_model)
        keys, values = self.n_heads * d_key, n_values * d_value
        widths = {"q": keys, "k": keys, "v": values, "beta": n_values}
        if self.decays:
            widths["decay"] = n_values
        if self.gate:
            widths["gate"] = values
        return widths

    def build(self, ctx: BuildCtx) -> DeltaNet:
        return DeltaNet(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d, widths = dims.d_model, self.projections(dims.d_model)
        n_values, d_key, d_value = self.resolved(d)
        state = dims.state_dtype_bytes
        total = sum((dims.linear(d, width, role=f"mixer.{name}") for name, width in widths.items()), Cost())
        total = total + dims.linear(n_values * d_value, d, role="mixer.out") + self.head_norm.cost(d_value)
        if self.conv_width is not None:
            total = total + short_conv_cost(widths["q"] + widths["k"] + widths["v"], self.conv_width, False, state)
        if self.decays:
            total = total + Cost(params=2 * n_values, active_params=2 * n_values)
        return total + delta_rule_cost(
            n_values, d_key, d_value, chunk=self.chunk, seq_len=seq_len, mode=mode, state_dtype_bytes=state
        )


@MIXERS.register(
    "delta_net",
    tiny=lambda: DeltaNetConfig(n_heads=2, chunk=8, head_norm=_TINY_NORM),
    paper="arXiv:2406.06484",
    status="experimental",
    tinies={
        "gate": lambda: DeltaNetConfig(
            n_heads=2, d_key=6, d_value=10, gate=True, negative_eigenvalues=True, chunk=8, head_norm=_TINY_NORM
        ),
        "bare": lambda: DeltaNetConfig(
            n_heads=1, n_value_heads=2, d_key=8, conv_width=None, chunk=5, head_norm=_TINY_NORM
        ),
    },
    about=About(
        equation="S_t = S_{t−1} + β_t k_t (v_t − k_t S_{t−1})ᵀ, y_t = q_t S_t, |k_t| = 1, β_t = sigmoid(W_β x_t)",
        use="Recall from a state of constant size: a new value replaces what its key held, so keys can be used again.",
        weakness="Nothing is forgotten until it is overwritten; training does more work per token than plain addition.",
    ),
)
class DeltaNetConfig(DeltaConfig):
    """Delta rule without decay.

    n_heads: of queries and keys; n_value_heads: several value heads may share one of them (None: as many). d_key,
    d_value: widths per head (None: d_model / n_heads, and d_key). conv_width: taps of the short convolution on
    queries, keys and values (None: no convolution). gate: the normalised output is multiplied by silu of a linear map.
    negative_eigenvalues: step sizes reach up to 2 instead of 1, so that a state can be reflected (Grazzi et al. 2025).
    head_norm: over each head's output. chunk: tokens per chunk.
    """


@MIXERS.register(
    "gated_delta_net",
    tiny=lambda: GatedDeltaNetConfig(n_heads=2, d_value=12, chunk=8, head_norm=_TINY_NORM),
    paper="arXiv:2412.06464",
    status="experimental",
    tinies={
        "grouped": lambda: GatedDeltaNetConfig(
            n_heads=1, n_value_heads=3, d_key=8, d_value=6, chunk=8, head_norm=_TINY_NORM
        ),
        "plain": lambda: GatedDeltaNetConfig(
            n_heads=2, gate=False, conv_width=2, negative_eigenvalues=True, chunk=5, head_norm=_TINY_NORM
        ),
    },
    about=About(
        equation="S_t = α_t S_{t−1} + β_t k_t (v_t − k_t α_t S_{t−1})ᵀ, y_t = q_t S_t, α_t = exp(−e^A softplus(W x_t))",
        use="Where a state of constant size should both fade as a whole and correct single entries; good in hybrids.",
        weakness="The state bounds what is remembered exactly; attention still wins where everything must be recalled.",
    ),
)
class GatedDeltaNetConfig(DeltaConfig):
    """Delta rule on a decaying state.

    n_heads: of queries and keys; n_value_heads: several value heads may share one of them (None: as many). d_key,
    d_value: widths per head (None: d_model / n_heads, and twice that). conv_width: taps of the short convolution on
    queries, keys and values (None: no convolution). gate: the normalised output is multiplied by silu of a linear map.
    negative_eigenvalues: step sizes reach up to 2 instead of 1, so that a state can be reflected (Grazzi et al. 2025).
    head_norm: over each head's output. chunk: tokens per chunk.
    dt_range, rate_range: at the start, time steps are log-uniform in the first and rates e^A uniform in the second.
    """

    values_per_key: ClassVar[int] = 2
    decays: ClassVar[bool] = True

    gate: bool = True
    dt_range: Interval = (0.001, 0.1)
    rate_range: Interval = (0.0, 16.0)


class DeltaNet(TokenMixer):
    """q, k [D -> G K], v, gate [D -> H V], beta, decay [D -> H], conv over q, k and v, out [H V -> D].

    The state holds the last inputs of the convolution and S [H, K, V].
    """

    caps = Caps(rollback="replay")

    def __init__(self, config: DeltaConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.n_heads, self.chunk = config.n_heads, config.chunk
        self.n_value_heads, self.d_key, self.d_value = config.resolved(ctx.d_model)
        self.largest_step = 2.0 if config.negative_eigenvalues else 1.0
        self.widths = config.projections(ctx.d_model)
        for name, width in self.widths.items():
            self.add_module(name, ctx.linear(ctx.d_model, width, role=f"mixer.{name}"))
        n_channels = sum(self.widths[name] for name in "qkv")
        self.conv = None if config.conv_width is None else ShortConvolution(n_channels, config.conv_width)
        self.time_step = None
        if isinstance(config, GatedDeltaNetConfig):
            self.time_step = TimeStep(self.n_value_heads, config.dt_range, config.rate_range)
        self.head_norm = config.head_norm.build(self.d_value)
        self.out = ctx.linear(self.n_value_heads * self.d_value, ctx.d_model, role="mixer.out")

    def kernel_requests(self, device: torch.device, dtype: torch.dtype) -> list[tuple[str, DeltaRuleQuery]]:
        """What the self-test of kernels must cover."""
        return [("delta_rule", DeltaRuleQuery(device.type, dtype, self.time_step is not None))]

    def correct(
        self, q: Tensor, factors: Tensors, state: Tensor | None, *, valid: Tensor | None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(outputs [B, T, H, V], S after the last real token)."""
        k, v, beta = factors["k"], factors["v"], factors["beta"]
        return delta_rule(q, k, v, beta, factors.get("log_decay"), starts, state, valid, self.chunk)

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        qkv, rest = self._project(x)
        qkv = F.silu(qkv) if self.conv is None else self.conv(qkv, seq)
        q, factors = self._factors(qkv, rest)
        y, _ = self.correct(q, factors, None, valid=None, starts=seq.starts() if seq.packed else None)
        return self._leave(y, rest)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        qkv, rest = self._project(x)
        if self.conv is None:
            qkv = F.silu(qkv)
        else:
            conv_state = state["conv"]
            assert isinstance(conv_state, ConvState)
            qkv = self.conv.extend(qkv, seq, conv_state)
        q, factors = self._factors(qkv, rest)
        memory = state["memory"]
        assert isinstance(memory, RecurrentState)
        return self._leave(extend(self.correct, q, factors, seq, memory), rest)

    def _project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(queries, keys and values beside one another [B, T, 2 G K + H V], the other projections by name)."""
        linears = [self.get_submodule(name) for name in self.widths]
        joined = project_joined(x, *linears)
        if joined is None:
            joined = torch.cat([linear(x) for linear in linears], dim=-1)
        q, k, v, *others = self.widths.values()
        qkv, *parts = joined.split([q + k + v, *others], dim=-1)
        return qkv, dict(zip(list(self.widths)[3:], parts))

    def _factors(self, qkv: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, Tensors]:
        """(q [B, T, G, K], {"k", "v": [B, T, H, V], "beta", "log_decay": [B, T, H] in fp32})."""
        q, k, v = qkv.split([self.widths[name] for name in "qkv"], dim=-1)
        q, k = (_unit_length(part.unflatten(-1, (-1, self.d_key))) for part in (q, k))
        beta = rest["beta"].to(torch.promote_types(qkv.dtype, torch.float32)).sigmoid() * self.largest_step
        factors = {"k": k, "v": v.unflatten(-1, (-1, self.d_value)), "beta": beta}
        if self.time_step is not None:
            factors["log_decay"] = self.time_step(rest["decay"])[1]
        return q * self.d_key**-0.5, factors

    def _leave(self, y: Tensor, rest: dict[str, Tensor]) -> Tensor:
        """y [B, T, H, V] -> [B, T, D]."""
        y = self.head_norm(y).flatten(2)
        return self.out(y * F.silu(rest["gate"]) if "gate" in rest else y)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        h, k, v = self.n_value_heads, self.d_key, self.d_value
        factors: dict[str, tuple[int, ...]] = {"k": (self.n_heads, k), "v": (h, v), "beta": (h,)}
        if self.time_step is not None:
            factors["log_decay"] = (h,)
        parts: dict[str, DecodeState] = {
            "memory": matrix_state(
                self.correct, batch, (h, k, v), factors, n_tentative=n_tentative, dtype=dtype, device=device
            )
        }
        if self.conv is not None:
            parts["conv"] = self.conv.new_state(batch, n_tentative=n_tentative, dtype=dtype, device=device)
        return CompositeState(parts)


def _unit_length(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, computed in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
