"""Leaky integrate-and-fire neurons along the sequence, with a surrogate gradient (LMUFormer, arXiv:2402.04882).

Each channel is a neuron: v_t = v_{t-1} + (x_t - v_{t-1}) / tau, it fires (1) where v_t >= threshold, which sets v to 0,
and is silent (0) elsewhere. The step has no gradient; backward takes that of sigmoid(sharpness (v - threshold)), and
none through the reset. On ordinary hardware this is slower than an activation: it goes token by token.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from llm.config.base import Config
from llm.core.seq import SeqInfo


class NeuronConfig(Config):
    """tau: tokens over which a potential leaks. threshold: potential at which it fires. sharpness: of the surrogate."""

    tau: float = Field(2.0, ge=1)
    threshold: float = Field(1.0, gt=0)
    sharpness: float = Field(4.0, gt=0)


def fire(
    x: Tensor, neuron: NeuronConfig, *, keep: Tensor | None = None, potential: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(spikes [B, T, C] of 0 and 1 in the dtype of x, potentials [B, T, C] after each token, in at least fp32).

    keep [B, T] bool: False where a token's document starts, whose neurons are at rest. potential [B, C]: where an
    earlier call has left off. Potentials carry no gradient.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    start = x.new_zeros(x.shape[0], x.shape[2], dtype=wide) if potential is None else potential.to(wide)
    kept = x.new_ones(x.shape[:2], dtype=wide) if keep is None else keep.to(wide)
    spikes, before = _fire(x.to(wide), kept, start, neuron.tau, neuron.threshold, neuron.sharpness)
    return spikes.to(x.dtype), (before * (1 - spikes)).detach()


def rests(seq: SeqInfo) -> Tensor | None:
    """`keep` of a training batch: None where a row is one document."""
    return ~seq.starts() if seq.packed else None


@torch.library.custom_op("manyformer::fire", mutates_args=())
def _fire(
    x: Tensor, keep: Tensor, start: Tensor, tau: float, threshold: float, sharpness: float
) -> tuple[Tensor, Tensor]:
    """Spikes and the potentials before the reset, [B, T, C]. One operator, so that the compiler does not unroll T."""
    spikes, before = torch.empty_like(x), torch.empty_like(x)
    v = start
    inputs = x / tau
    decay = keep * (1 - 1 / tau)
    for t in range(x.shape[1]):
        v = torch.addcmul(inputs[:, t], v, decay[:, t, None])
        fired = (v >= threshold).to(v.dtype)
        before[:, t], spikes[:, t] = v, fired
        v = v * (1 - fired)
    return spikes, before


@_fire.register_fake
def _(x: Tensor, keep: Tensor, start: Tensor, tau: float, threshold: float, sharpness: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("manyformer::fire_backward", mutates_args=())
def _fire_backward(
    grad: Tensor, spikes: Tensor, before: Tensor, keep: Tensor, tau: float, threshold: float, sharpness: float
) -> Tensor:
    """The gradient of x: the potentials' gradients, a linear recurrence backwards, over tau."""
    smooth = torch.sigmoid(sharpness * (before - threshold))
    direct = grad * (sharpness * smooth * (1 - smooth))
    through = (1 - spikes) * (1 - 1 / tau)
    out = torch.empty_like(grad)
    later = torch.zeros_like(grad[:, 0])
    for t in range(grad.shape[1] - 1, -1, -1):
        later = torch.addcmul(direct[:, t], through[:, t], later)
        out[:, t] = later
        later = later * keep[:, t, None]
    return out / tau


@_fire_backward.register_fake
def _(
    grad: Tensor, spikes: Tensor, before: Tensor, keep: Tensor, tau: float, threshold: float, sharpness: float
) -> Tensor:
    return torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, keep, _, *ctx.numbers = inputs
    ctx.save_for_backward(*output, keep)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _fire_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers), None, None, None, None, None


_fire.register_autograd(_gradients, setup_context=_save)
