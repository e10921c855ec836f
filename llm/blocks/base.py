"""The sockets: base classes and registries of token mixers, channel mixers, linears, norms, positions and residuals.

Shapes: x [B, T, D]; a block sees `BuildCtx` when it is built and `SeqInfo` when it runs, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llm.config.base import Config, Tagged
from llm.core.cost import Cost, Dims, Mode
from llm.core.init import Init, depth_scaled
from llm.core.registry import Registry
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, EmptyState

MIXERS: Registry[MixerConfig] = Registry("mixer")
CHANNELS: Registry[ChannelConfig] = Registry("channel")
LINEARS: Registry[LinearConfig] = Registry("linear")
NORMS: Registry[NormConfig] = Registry("norm")
POSITIONS: Registry[PositionConfig] = Registry("position")
RESIDUALS: Registry[ResidualConfig] = Registry("residual")


@dataclass(frozen=True)
class Caps:
    """What a mixer can do. `rollback`: how its state forgets rejected tokens."""

    causal: bool = True
    packing: bool = True
    rollback: Literal["free", "copies", "replay", "none"] = "free"
    needs_positions: bool = False
    max_train_len: int | None = None


class InitConfig(Config):
    """Initial standard deviation of linear layers and embeddings.

    std: fixed standard deviation; None: 1/sqrt(d_in) of each layer (and 1 / sqrt(d_model) for embeddings).
    scale_residual: divide that of projections into the residual stream by sqrt(2 * layers).
    zero_residual: start those projections at zero instead.
    """

    std: float | None = 0.02
    scale_residual: bool = True
    zero_residual: bool = False
    distribution: Literal["normal", "truncated_normal", "uniform"] = "normal"


@dataclass(frozen=True)
class BuildCtx:
    """What a block may know of the model around it, and the sockets through which it gets its parts."""

    d_model: int
    layer: int
    n_layers: int
    max_seq_len: int
    linears: Mapping[str, LinearConfig]
    """Role glob -> linear config; the last match wins, a dense layer where none matches."""
    norm_config: NormConfig
    position_config: PositionConfig
    init: InitConfig
    dropout: float = 0.0
    residual_roles: tuple[str, ...] = ("mixer.out", "channel.down")

    def linear_config(self, role: str) -> LinearConfig:
        """Which linear stands at a role, a dotted name such as "mixer.q" or "channel.up"."""
        chosen: LinearConfig | None = None
        for pattern, config in self.linears.items():
            if fnmatchcase(role, pattern):
                chosen = config
        return chosen if chosen is not None else LINEARS.get("dense")()  # type: ignore[call-arg]

    def init_std(self, d_in: int, role: str) -> float:
        """Initial standard deviation of the weights at a role."""
        std = self.init.std if self.init.std is not None else d_in**-0.5
        if role in self.residual_roles:
            if self.init.zero_residual:
                return 0.0
            if self.init.scale_residual:
                return depth_scaled(std, self.n_layers)
        return std

    def linear(self, d_in: int, d_out: int, *, role: str, bias: bool = False) -> nn.Module:
        """The linear layer for a role: maps [..., d_in] to [..., d_out]."""
        return self.linear_config(role).build(d_in, d_out, bias=bias, std=self.init_std(d_in, role), init=self.init)

    def norm(self, dim: int, *, role: str) -> nn.Module:
        """The normalisation for a role: keeps [..., dim]."""
        return self.norm_config.build(dim)

    def position(self) -> PositionEncoding:
        """What of the model's position encoding acts inside a mixer; its hooks say where."""
        return self.position_config.build_for_mixer(self)

    def dims(self, state_dtype_bytes: int = 2) -> Dims:
        """The same facts for cost accounting."""
        return Dims(
            d_model=self.d_model,
            layer=self.layer,
            n_layers=self.n_layers,
            max_seq_len=self.max_seq_len,
            linear=lambda d_in, d_out, *, role, bias=False: self.linear_config(role).cost(d_in, d_out, bias=bias),
            norm=lambda dim, *, role: self.norm_config.cost(dim),
            position=self.position_config,
            state_dtype_bytes=state_dtype_bytes,
        )


class TokenMixer(nn.Module):
    """Mixes information over time. forward, prefill and any split into steps give the same outputs."""

    caps: ClassVar[Caps] = Caps()

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        """Put what all layers share for this forward into `seq.derived`; called outside compiled regions."""

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        """Training and scoring, x [B, T, D] -> [B, T, D], no state."""
        raise NotImplementedError

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        """The same for T >= 1 tokens after those in `state`, which is advanced; also verifies drafts."""
        raise NotImplementedError

    def step(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        """One token, x [B, 1, D]."""
        return self.prefill(x, seq, state)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        """An empty state for `batch` rows of at most `capacity` tokens and transactions of `n_tentative`."""
        raise NotImplementedError


class ChannelMixer(nn.Module):
    """Mixes channels token by token (a stateful one overrides `new_state` and says so)."""

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        raise NotImplementedError

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState | None:
        """None for a token-wise channel mixer."""
        return None

    def after_step(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Called after each optimizer step, with the sum over ranks where there are several: state that is moved by a
        rule of its own, not by gradients."""


class PositionEncoding(nn.Module):
    """Three optional hooks; a mixer calls those that it can honour."""

    def for_heads(self, d_head: int) -> None:
        """Called once by a mixer that will call `at_qk` with heads of this width; UserError where that cannot be."""

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        """Put shared tables into `seq.derived`, for queries and keys of `dtype`."""

    def at_embed(self, x: Tensor, seq: SeqInfo) -> Tensor:
        """Act on embeddings [B, T, D]."""
        return x

    def at_qk(self, q: Tensor, k: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor]:
        """Act on queries [B, T, H, Dh] and keys [B, T, Hkv, Dh] of the same tokens."""
        return q, k

    def slopes(self, n_heads: int) -> Tensor | None:
        """[H] fp32 slope per head, on the CPU, of a bias -slope * distance on the scores (ALiBi), or None."""
        return None


class MixerConfig(Tagged):
    """Config of a token mixer."""

    registry = MIXERS

    def build(self, ctx: BuildCtx) -> TokenMixer:
        """The module; parameters on the current default device."""
        raise NotImplementedError

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        """What it costs; equal to the built module."""
        raise NotImplementedError

    def causal_share(self, seq_len: int) -> float:
        """Of the work between tokens that its forward does, the share in which a later one asks an earlier one; it is
        what `cost` tells: half of it, where whole squares of tokens are multiplied."""
        return (seq_len + 1) / (2 * seq_len)

    def longest(self, max_seq_len: int) -> int | None:
        """Most tokens of a sequence that it can read in a model of max_seq_len; None: any number."""
        return None


class ChannelConfig(Tagged):
    """Config of a channel mixer."""

    registry = CHANNELS

    def build(self, ctx: BuildCtx) -> ChannelMixer:
        """The module."""
        raise NotImplementedError

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        """What it costs."""
        raise NotImplementedError


class LinearConfig(Tagged):
    """Config of what stands where a linear layer stands."""

    registry = LINEARS

    def build(self, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig) -> nn.Module:
        """The module, with its weights to start at standard deviation `std` where that has a meaning."""
        raise NotImplementedError

    def cost(self, d_in: int, d_out: int, *, bias: bool) -> Cost:
        """What it costs."""
        raise NotImplementedError


class NormConfig(Tagged):
    """Config of a normalisation over the last dimension."""

    registry = NORMS

    def build(self, dim: int) -> nn.Module:
        """The module."""
        raise NotImplementedError

    def cost(self, dim: int) -> Cost:
        """What it costs."""
        raise NotImplementedError


class PositionConfig(Tagged):
    """Config of a position encoding."""

    registry = POSITIONS

    def build(self, ctx: BuildCtx) -> PositionEncoding:
        """The module that acts on the embeddings."""
        raise NotImplementedError

    def build_for_mixer(self, ctx: BuildCtx) -> PositionEncoding:
        """The module that acts inside a mixer: the same, unless it owns a table, which must exist only once."""
        return self.build(ctx)

    def cost(self, d_model: int, max_seq_len: int) -> Cost:
        """What it costs once per model (learned tables)."""
        return Cost()


class Residual(nn.Module):
    """Joins a mixer and a channel mixer to the residual stream, and owns the norms."""

    def forward(
        self, x: Tensor, mixer: Callable[[Tensor], Tensor] | None, channel: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; either part may be absent."""
        raise NotImplementedError


class ResidualConfig(Tagged):
    """Config of a residual style."""

    registry = RESIDUALS

    def build(self, ctx: BuildCtx, *, mixer: bool, channel: bool) -> Residual:
        """The module for a block that has a mixer and/or a channel mixer."""
        raise NotImplementedError

    def cost(self, dims: Dims, *, mixer: bool, channel: bool) -> Cost:
        """Cost of its norms."""
        raise NotImplementedError


def after_step(model: nn.Module, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    """Call `after_step` of every module that has such a method; a strategy does so after each optimizer step."""
    for module in model.modules():
        hook: Any = getattr(module, "after_step", None)
        if hook is not None:
            hook(all_reduce)


def kernel_requests(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Any]]:
    """(operation, query) of everything that a model's modules will ask of `kernels`, for its self-test."""
    found: dict[tuple[str, Any], None] = {}
    for module in model.modules():
        requests: Any = getattr(module, "kernel_requests", None)
        if requests is not None:
            found.update(dict.fromkeys(requests(device, dtype)))
    return list(found)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which linear layers put out what they get in `dtype`: autocast's where it is on."""
    if not torch.is_autocast_enabled(device.type) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device.type)


def linear_init(std: float, init: InitConfig) -> Init:
    """The initialiser of a weight matrix at a given standard deviation."""
    from llm.core import init as inits

    if std == 0.0:
        return inits.constant(0.0)
    if init.distribution == "uniform":
        bound = 3.0**0.5 * std
        return inits.uniform(-bound, bound)
    return inits.truncated_normal(std) if init.distribution == "truncated_normal" else inits.normal(std)


def stateless(batch: int, device: Any) -> DecodeState:
    """State of a mixer that remembers nothing."""
    return EmptyState(batch, device=device)
