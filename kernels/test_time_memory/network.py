"""The networks that serve as memory, and the factors of their inner gradients.

Weights of a memory are a tuple (w1,) for a matrix, (w1, w2) for an MLP and (w1, w2, w3) for a gated MLP:

    matrix: u = w1 z        mlp: u = w1 gelu(w2 z)        gated_mlp: u = w1 (gelu(w2 z) * w3 z)

w1 [..., d_v, hidden or D], w2 and w3 [..., hidden, D], z [..., T, D] lifted keys or queries. Leading dimensions are
[B, H] or [B, H, G]; weights of [H, m, n] alone are shared by all B and G. The gradient of a loss of one token with
respect to any weight is an outer product, error input^T; `gradient_factors` gives both for all tokens at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.test_time_memory.newton_schulz import Table

Weights = tuple[Tensor, ...]
Network = Literal["matrix", "mlp", "gated_mlp"]
Bias = Literal["dot", "l2"]
Optimizer = Literal["gd", "momentum", "muon"]

N_WEIGHTS: dict[Network, int] = {"matrix": 1, "mlp": 2, "gated_mlp": 3}
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Form:
    """What the inner optimisation is, without its tensors.

    normed: a layer norm stands behind the network. window: c, tokens whose losses each step looks at.
    block: tokens treated at once. Gradients are taken at the memory before the block, except with `exact`, which gives
    those of one token after another (matrix, l2, c = 1) whatever the block.
    decayed: gradients are taken at the decayed memory (with `exact` alone).
    pre: tokens read before they are written. muon_block: one Newton-Schulz for each block, whose tokens read the memory
    before it. eta_inside: the step size multiplies gradients instead of the orthogonalised momentum.
    renormed: after each whole block the rows of all weights are scaled back to the lengths they began with.
    """

    network: Network = "matrix"
    bias: Bias = "l2"
    normed: bool = False
    optimizer: Optimizer = "gd"
    window: int = 1
    block: int = 16
    exact: bool = False
    decayed: bool = False
    pre: bool = False
    muon_block: bool = False
    ns_steps: int = 5
    ns_table: Table = "quintic"
    eta_inside: bool = False
    renormed: bool = False

    @property
    def n_weights(self) -> int:
        """Number of weight matrices."""
        return N_WEIGHTS[self.network]

    @property
    def momentum(self) -> bool:
        """Whether there is a momentum."""
        return self.optimizer != "gd"

    @property
    def aligned(self) -> bool:
        """Whether it matters where blocks begin."""
        constant_gradient = self.network == "matrix" and self.bias == "dot" and not self.normed
        return self.block > 1 and (self.muon_block or not (self.exact or constant_gradient))


@dataclass(frozen=True)
class LayerNorm:
    """scale, shift [H, d_v]: normalises what a memory puts out (TTT)."""

    scale: Tensor
    shift: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """u [..., T, d_v]"""
        return self._normal(u)[0] * _per_head(self.scale, u) + _per_head(self.shift, u)

    def gradient(self, u: Tensor, target: Tensor, bias: Bias) -> Tensor:
        """Gradient of the loss with respect to u."""
        normal, inverse = self._normal(u)
        scale = _per_head(self.scale, u)
        error = -target
        if bias == "l2":
            error = normal * scale + _per_head(self.shift, u) - target
        error = error * scale
        centred = error - error.mean(-1, keepdim=True) - normal * (error * normal).mean(-1, keepdim=True)
        return centred * inverse

    @staticmethod
    def _normal(u: Tensor) -> tuple[Tensor, Tensor]:
        centred = u - u.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
        return centred * inverse, inverse


def _per_head(x: Tensor, like: Tensor) -> Tensor:
    """x [H, d] or [H, m, 1] so that it broadcasts against like [B, H, ..., T, d] or [B, H, ..., m, n]."""
    return x.reshape(x.shape[0], *(1,) * (like.dim() - 1 - x.dim()), *x.shape[1:])


def gelu(x: Tensor) -> Tensor:
    """GELU with the exact normal distribution."""
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of `gelu`."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x.square()) * (2 * math.pi) ** -0.5


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., T, n] through weight [..., m, n], or [H, m, n] for all rows of x [B, H, ..., T, n] -> [..., T, m]."""
    if weight.dim() == 3:
        return torch.einsum("bh...n,hmn->bh...m", x, weight)
    return x @ weight.mT


def recall(form: Form, weights: Weights, z: Tensor, norm: LayerNorm | None) -> Tensor:
    """What the memory answers to z [..., T, D]: [..., T, d_v]."""
    if form.network == "matrix":
        u = times(z, weights[0])
    elif form.network == "mlp":
        u = times(gelu(times(z, weights[1])), weights[0])
    else:
        u = times(gelu(times(z, weights[1])) * times(z, weights[2]), weights[0])
    return u if norm is None else norm(u)


def row_lengths(weights: Weights) -> Weights:
    """[..., m, 1] per weight [..., m, n]."""
    return tuple(torch.linalg.vector_norm(w, dim=-1, keepdim=True).clamp(min=1e-12) for w in weights)


def renormed(weights: Weights, lengths: Weights) -> Weights:
    """Weights [..., m, n] with rows of the lengths [H, m, 1]."""
    return tuple(w * (_per_head(to, w) / own) for w, to, own in zip(weights, lengths, row_lengths(weights)))


def gradient_factors(
    form: Form, weights: Weights, z: Tensor, target: Tensor, norm: LayerNorm | None
) -> tuple[Weights, Weights]:
    """(inputs, errors) per weight w: the gradient of token i's loss is errors_w[i] inputs_w[i]^T.

    The loss is 1/2 |M(z) - target|^2 for "l2" and -<M(z), target> for "dot"; z [..., T, D], target [..., T, d_v].
    """

    def error(u: Tensor) -> Tensor:
        if norm is not None:
            return norm.gradient(u, target, form.bias)
        return u - target if form.bias == "l2" else -target

    needs_output = norm is not None or form.bias == "l2"
    if form.network == "matrix":
        return (z,), (error(times(z, weights[0]) if needs_output else target),)
    before = times(z, weights[1])
    active = gelu(before)
    linear = times(z, weights[2]) if form.network == "gated_mlp" else None
    hidden = active if linear is None else active * linear
    delta = error(times(hidden, weights[0]) if needs_output else target)
    back = times(delta, weights[0].mT)
    if linear is None:
        return (hidden, z), (delta, back * gelu_slope(before))
    return (hidden, z, z), (delta, back * linear * gelu_slope(before), back * active)
