"""Nested feed-forward layers (MatFormer): the first hidden units of one layer form smaller layers that work by
themselves.

Which width runs is no global setting. `NestedChannel.width` belongs to a layer and is set at inference, layer by layer
(llm/models/nesting.py). A training step that scores several widths at once hands the granularity down with the sequence
description instead, so that activations computed again in the backward pass are those of the same width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer, InitConfig
from llm.blocks.channels.activations import ACTIVATIONS, gated
from llm.blocks.channels.gated import GatedChannel, GatedConfig, GeGLUConfig, SwiGLUConfig
from llm.blocks.channels.mlp import MLP, MLPConfig
from llm.blocks.linears.dense import DenseLinear, project_joined, quantized_linear
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState

GRANULARITIES = (0.125, 0.25, 0.5, 1.0)
"""S, M, L and XL of the paper."""

_INDEX, _FRACTION = "nested/index", "nested/fraction"
"""Keys of SeqInfo.derived: the granularity of this forward pass as an int, which picks a graph of its own when blocks
are compiled, and as a tensor, with which one graph serves all."""


def _as_fraction(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        raise PydanticCustomError("fraction", "expected a fraction of the hidden width such as 1/4 or 0.25") from None


Share = Annotated[float, BeforeValidator(_as_fraction), Field(gt=0, le=1)]
"""A share of the hidden width, written 0.25 or 1/4."""


def units(fraction: float, d_hidden: int) -> int:
    """How many hidden units a fraction is; UserError where that is no whole number."""
    exact = fraction * d_hidden
    if round(exact) < 1 or abs(exact - round(exact)) > 1e-6 * d_hidden:
        raise UserError(f"{fraction:g} of {d_hidden} hidden units is {exact:g}; give a fraction that is a whole number")
    return round(exact)


def check_granularities(granularities: Sequence[float]) -> None:
    """UserError unless the fractions rise and end with the whole."""
    if any(a >= b for a, b in zip(granularities, granularities[1:])) or granularities[-1] != 1.0:
        raise UserError(f"granularities must rise and end with 1; given {list(granularities)}")


class NestedConfig(ChannelConfig):
    """What both nested layers share. granularities: fractions of d_hidden which training makes work by themselves, from
    the smallest to 1. form: "sliced" computes the active units alone; "masked" computes all and zeroes the others, in
    one graph for all widths and with any linear; "auto" slices where all linears are dense."""

    granularities: tuple[Share, ...] = Field(GRANULARITIES, min_length=1)
    form: Literal["auto", "sliced", "masked"] = "auto"

    @field_validator("granularities")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        check_granularities(value)
        return value

    def width(self, d_model: int) -> int:
        """Hidden width."""
        raise NotImplementedError

    def plain(self, d_hidden: int) -> ChannelConfig:
        """The ordinary layer of the first d_hidden units."""
        raise NotImplementedError

    def roles(self) -> tuple[str, ...]:
        """Roles of its linears."""
        raise NotImplementedError

    def sliceable(self, ctx: BuildCtx) -> bool:
        """Whether the weights of its linears can be cut."""
        return all(ctx.linear_config(role).type == "dense" for role in self.roles())

    def sliced(self, ctx: BuildCtx) -> bool:
        """Whether a smaller width costs less; UserError where that is asked for and cannot be."""
        if self.form == "sliced" and not self.sliceable(ctx):
            given = next(role for role in self.roles() if ctx.linear_config(role).type != "dense")
            raise UserError(
                f"{self.type}: form=sliced cuts the weights of dense linears, but at {given} stands "
                f"{ctx.linear_config(given).type!r}; set form: masked or take dense linears at channel.*"
            )
        return self.form != "masked" and self.sliceable(ctx)

    def nest(self, plain: MLP | GatedChannel, ctx: BuildCtx) -> NestedChannel:
        """The nested layer with the linears of an ordinary one."""
        d_hidden = self.width(ctx.d_model)
        gate = plain.gate if isinstance(plain, GatedChannel) else None
        return NestedChannel(
            plain.up, plain.down, gate, activation=self.activation_name(), sliced=self.sliced(ctx),
            widths=[units(fraction, d_hidden) for fraction in self.granularities],
        )  # fmt: skip

    def activation_name(self) -> str:
        """Name of the activation."""
        raise NotImplementedError


@CHANNELS.register(
    "nested_mlp",
    tiny=lambda: NestedMLPConfig(d_hidden=24, bias=True),
    paper="arXiv:2310.07707 (MatFormer)",
    status="experimental",
    tinies={
        "masked": lambda: NestedMLPConfig(d_hidden=24, form="masked"),
        "relu2": lambda: NestedMLPConfig(d_hidden=24, activation="relu2", granularities=(1 / 3, 1.0)),
    },
    about=About(
        equation="y_i = W_down[:, :m_i] act(W_up[:m_i] x + b_up[:m_i]) + b_down, m_1 < ... < m_g = hidden width",
        use="A family of models from one run, trained by the wrapper `nested`: each layer can be cut to less width.",
        weakness="The whole width gives up a little quality to the smaller ones; attention and caches do not shrink.",
    ),
)
class NestedMLPConfig(MLPConfig, NestedConfig):
    """down(act(up(x))) with nested hidden units; d_hidden None: 4 times the model width.

    granularities: fractions of d_hidden that training makes work by themselves, from the smallest to 1. form: "sliced"
    computes the active units alone; "masked" computes all and zeroes the others, in one graph for all widths and with
    any linear; "auto" slices where all linears are dense.
    """

    def roles(self) -> tuple[str, ...]:
        return ("channel.up", "channel.down")

    def activation_name(self) -> str:
        return self.activation

    def plain(self, d_hidden: int) -> MLPConfig:
        return MLPConfig(d_hidden=d_hidden, activation=self.activation, bias=self.bias)

    def build(self, ctx: BuildCtx) -> NestedChannel:  # type: ignore[override]
        return self.nest(MLP(self, ctx), ctx)


@CHANNELS.register(
    "nested_gated",
    tiny=lambda: NestedGatedConfig(d_hidden=24),
    paper="arXiv:2310.07707 (MatFormer)",
    status="experimental",
    tinies={
        "masked": lambda: NestedGatedConfig(d_hidden=24, bias=True, form="masked"),
        "geglu": lambda: NestedGatedConfig(d_hidden=24, bias=True, gate="gelu_tanh", granularities=(0.25, 1.0)),
    },
    about=About(
        equation="y_i = W_down[:, :m_i] (act(W_gate[:m_i] x) ⊙ W_up[:m_i] x), m_1 < ... < m_g = hidden width",
        use="As `nested_mlp`, for SwiGLU and GeGLU; every slice is an ordinary gated layer and exports as one.",
        weakness="The whole width gives up a little quality to the smaller ones; attention and caches do not shrink.",
    ),
)
class NestedGatedConfig(GatedConfig, NestedConfig):
    """down(act(gate(x)) * up(x)) with nested hidden units. gate: silu is SwiGLU, gelu and gelu_tanh are GeGLU.

    d_hidden None: 8/3 of the model width, rounded up to a multiple of 32. granularities: fractions of d_hidden that
    training makes work by themselves, from the smallest to 1. form: "sliced" computes the active units alone; "masked"
    computes all and zeroes the others, in one graph for all widths and with any linear; "auto" slices where all linears
    are dense.
    """

    gate: Literal["silu", "gelu", "gelu_tanh"] = "silu"

    def roles(self) -> tuple[str, ...]:
        return ("channel.gate", "channel.up", "channel.down")

    def activation(self) -> str:
        return self.gate

    def activation_name(self) -> str:
        return self.gate

    def plain(self, d_hidden: int) -> GatedConfig:
        if self.gate == "silu":
            return SwiGLUConfig(d_hidden=d_hidden, bias=self.bias)
        approximate: Literal["none", "tanh"] = "none" if self.gate == "gelu" else "tanh"
        return GeGLUConfig(d_hidden=d_hidden, bias=self.bias, approximate=approximate)

    def build(self, ctx: BuildCtx) -> NestedChannel:  # type: ignore[override]
        return self.nest(GatedChannel(self, ctx), ctx)


def nested_of(channel: ChannelConfig | None, granularities: tuple[float, ...]) -> NestedConfig | None:
    """The nested layer with the parameters of an ordinary one; None for what cannot be nested."""
    if type(channel) is MLPConfig:
        return NestedMLPConfig(
            d_hidden=channel.d_hidden, activation=channel.activation, bias=channel.bias, granularities=granularities
        )
    if isinstance(channel, SwiGLUConfig | GeGLUConfig) and type(channel) in (SwiGLUConfig, GeGLUConfig):
        gate: Any = channel.activation()
        return NestedGatedConfig(d_hidden=channel.d_hidden, gate=gate, bias=channel.bias, granularities=granularities)
    return None


class NestedChannel(ChannelMixer):
    """gate (or None) and up [D -> H], down [H -> D]; only the first `width` hidden units exist at a time.

    widths: hidden units of each granularity, the whole last. width: units in use where the forward pass does not name a
    granularity, at first all.
    """

    def __init__(
        self,
        up: nn.Module,
        down: nn.Module,
        gate: nn.Module | None = None,
        *,
        activation: str,
        widths: Sequence[int],
        sliced: bool,
    ) -> None:
        super().__init__()
        if gate is not None:
            self.gate: Any = gate
        self.up: Any = up
        self.down: Any = down
        self.is_gated = gate is not None
        self.activation = activation
        self.widths = tuple(widths)
        self.d_hidden = self.width = widths[-1]
        self.sliced = sliced
        for part in (gate, up):
            if type(part) is DenseLinear:
                part.by_output = True

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        if not self.sliced:
            hidden = self._hidden(x, self.d_hidden)
            return self.down(hidden.masked_fill(self._idle(seq, hidden), 0.0))
        n = self.widths[seq.derived[_INDEX]] if _INDEX in seq.derived else self.width
        hidden = self._hidden(x, n)
        if n == self.d_hidden:
            return self.down(hidden)
        return self._linear(hidden, self.down, self.down.weight[:, :n], self.down.bias)

    def _hidden(self, x: Tensor, n: int) -> Tensor:
        """The first n hidden units, [..., n]."""
        whole = n == self.d_hidden
        if not self.is_gated:
            up = self.up(x) if whole else self._linear(x, self.up, self.up.weight[:n], _first(self.up.bias, n))
            return ACTIVATIONS[self.activation](up)
        if whole:
            joined = project_joined(x, self.gate, self.up)
            if joined is None:
                return ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        elif self._laid_out() and not torch.is_grad_enabled():
            # Putting the slices together would cost more than two products of few rows.
            gate, up = (self._linear(x, part, part.weight[:n], _first(part.bias, n)) for part in (self.gate, self.up))
            return ACTIVATIONS[self.activation](gate) * up
        else:
            weight = torch.cat([self.gate.weight[:n], self.up.weight[:n]])
            bias = None if self.up.bias is None else torch.cat([self.gate.bias[:n], self.up.bias[:n]])
            joined = F.linear(x, weight, bias)
        return gated(joined, self.activation)

    @staticmethod
    def _linear(x: Tensor, part: DenseLinear, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of a piece of a part's weight."""
        return quantized_linear(x, weight, bias) if part.quantized else F.linear(x, weight, bias)

    def _laid_out(self) -> bool:
        """Whether the model has been made ready for generation."""
        gate = self.gate
        return type(gate) is DenseLinear and (gate.may_join or gate.joined is not None or gate.quantized)

    def _idle(self, seq: SeqInfo, hidden: Tensor) -> Tensor:
        """[H] bool: units beyond the width."""
        number = torch.arange(self.d_hidden, device=hidden.device)
        if _FRACTION in seq.derived:
            # Half a unit to spare on both sides of a rounded product.
            return number + 0.5 > seq.derived[_FRACTION] * self.d_hidden
        return number >= self.width

    def set_width(self, width: int) -> None:
        """Use the first `width` hidden units from now on; any number of them runs."""
        if not 1 <= width <= self.d_hidden:
            raise UserError(f"a width of {width} hidden units; allowed: 1 to {self.d_hidden}")
        self.width = width

    def submodel(self, fraction: float) -> NestedChannel:
        """The layer of the first hidden units by itself. It shares storage with this one, and trains neither."""
        n = units(fraction, self.d_hidden)
        if not all(type(part) is DenseLinear for part in self.children()):
            raise UserError("only a nested layer of dense linears has a sub-model; take dense linears at channel.*")
        return NestedChannel(
            _part(self.up, slice(n), slice(None)), _part(self.down, slice(None), slice(n)),
            _part(self.gate, slice(n), slice(None)) if self.is_gated else None,
            activation=self.activation, sliced=self.sliced, widths=[width for width in self.widths if width < n] + [n],
        )  # fmt: skip


def at_granularity(seq: SeqInfo, granularities: Sequence[float], index: int) -> SeqInfo:
    """A description for a forward pass at one granularity in all layers; what is derived already is shared."""
    fraction = torch.full((), granularities[index], device=seq.positions.device)
    return replace(seq, derived={**seq.derived, _INDEX: index, _FRACTION: fraction})


def _first(bias: Tensor | None, n: int) -> Tensor | None:
    return None if bias is None else bias[:n]


def _part(linear: DenseLinear, rows: slice, columns: slice) -> DenseLinear:
    """A dense linear whose parameters are views of another's."""
    weight = linear.weight.detach()[rows, columns]
    init = InitConfig()
    with torch.device("meta"):
        part = DenseLinear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, std=linear.std, init=init)
    part.init = linear.init
    part.weight = nn.Parameter(weight)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[rows])
    return part
