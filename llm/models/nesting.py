"""Slices of a nested model at run time: every layer has a width of its own, and nothing is copied (Mix'n'Match)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from pydantic import model_validator
from torch import nn

from llm.blocks.channels.nested import NestedChannel, Share, units
from llm.config.base import Config
from llm.core.errors import UserError
from llm.models.config import ModelConfig
from llm.models.wrappers.nested import nested_layers

T = TypeVar("T")


class SliceOptions(Config):
    """Which part of a nested model to use. slice: share of the hidden units of every nested layer, or a list with one
    per layer. widths: the same in hidden units."""

    slice: Share | list[Share] | None = None
    widths: int | list[int] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> SliceOptions:
        if self.slice is not None and self.widths is not None:
            raise UserError("give one of slice and widths, not both")
        return self

    def of(self, config: ModelConfig) -> list[int] | None:
        """Hidden units of each nested layer of a model; None where no slice was asked for."""
        if self.slice is None and self.widths is None:
            return None
        whole = whole_widths(config)
        if not whole:
            raise UserError(
                f"{'slice' if self.widths is None else 'widths'} is for nested models; this one was not trained so "
                "(channels nested_mlp, nested_gated, or the wrapper nested)"
            )
        if self.widths is not None:
            widths = _one_per_layer(self.widths, len(whole), "widths")
        else:
            assert self.slice is not None
            widths = [units(f, n) for f, n in zip(_one_per_layer(self.slice, len(whole), "slice"), whole)]
        check_widths(widths, whole)
        return widths


def _one_per_layer(given: T | list[T], n_layers: int, name: str) -> list[T]:
    if not isinstance(given, list):
        return [given] * n_layers
    if len(given) != n_layers:
        raise UserError(f"{name} has {len(given)} entries, the model {n_layers} nested layers; give one, or one each")
    return given


def slice_suffix(widths: Sequence[int] | None) -> str:
    """What tells files about a slice from those about the whole: nothing, "-512", or "-mixed-" and a hash."""
    if widths is None:
        return ""
    if len(set(widths)) == 1:
        return f"-{widths[0]}"
    return f"-mixed-{hashlib.sha256(str(list(widths)).encode()).hexdigest()[:8]}"


def check_widths(widths: Sequence[int], whole: Sequence[int]) -> None:
    """UserError unless there is one width per layer, none beyond the layer's own."""
    if len(widths) != len(whole):
        raise UserError(f"{len(widths)} widths for {len(whole)} nested layers; give one for each")
    for layer, (n, most) in enumerate(zip(widths, whole)):
        if not 1 <= n <= most:
            raise UserError(f"nested layer {layer} has {most} hidden units; given a width of {n}")


def whole_widths(config: ModelConfig) -> list[int]:
    """Hidden units of each nested layer."""
    return [nested.width(config.d_model) for nested in nested_layers(config).values()]


def nested_channels(model: nn.Module) -> list[NestedChannel]:
    """The nested layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, NestedChannel)]


def set_widths(model: nn.Module, widths: Sequence[int] | None) -> None:
    """Use so many hidden units of each nested layer from now on, in evaluation and decoding; None: all.

    A decode state belongs to the widths that wrote it. Training steps take their granularity from the wrapper.
    """
    channels = nested_channels(model)
    whole = [channel.d_hidden for channel in channels]
    chosen = whole if widths is None else list(widths)
    check_widths(chosen, whole)
    for channel, width in zip(channels, chosen):
        channel.set_width(width)


@contextmanager
def at_widths(model: nn.Module, widths: Sequence[int] | None) -> Iterator[None]:
    """`set_widths` for a while; the widths before it come back."""
    before = [channel.width for channel in nested_channels(model)]
    set_widths(model, widths)
    try:
        yield
    finally:
        set_widths(model, before)
