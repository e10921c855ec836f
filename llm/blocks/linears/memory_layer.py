"""Memory Layer (Ding et al. 2024, MemoryFormer): tables addressed by the signs of the input, where a matrix stood.

The input is cut into K pieces of n_bits numbers. The signs of a piece address one row of its table of 2^n_bits rows,
and the K rows are summed with weights that carry the gradient. Two formulas of the weights are in use: the paper's
(`prob`) and that of the released code (`l1_prob`), whose size does not shrink with n_bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.memory_layer import hash_codes, hash_weights, lookup_query, memory_lookup
from kernels.memory_layer.hashing import Weighting
from llm.blocks.base import LINEARS, InitConfig, LinearConfig, compute_dtype, linear_init
from llm.core.cost import Cost
from llm.core.errors import UserError
from llm.core.init import Init, normal
from llm.core.registry import About

BIAS_STD = 0.001


@LINEARS.register(
    "memory_layer",
    tiny=lambda: MemoryLayerConfig(n_bits=2),
    paper="arXiv:2411.12992",
    status="experimental",
    about=About(
        equation="y = b + Σ_k p(z_k) T_k[signs of z_k], z: x in K pieces; p = Π σ(2|z_j|), or that times Σ|z_j|",
        use="Where multiply-adds are dearer than memory: 2·d_in·d_out/n_bits FLOPs instead of 2·d_in·d_out.",
        weakness="2^n_bits/n_bits times the parameters; each row learns only from tokens that address it; outputs jump "
        "where a sign flips, so the input should come from a norm.",
    ),
)
class MemoryLayerConfig(LinearConfig):
    """Look-up tables [d_in / n_bits, 2^n_bits, d_out].

    weighting: prob, the softmax over all sign vectors at the addressed one (the paper), at `temperature`; l1_prob, that
    times the sum of absolute values (the released code). table_std: initial standard deviation of the tables; None:
    what gives outputs as large as a dense layer's for standard normal inputs.
    """

    n_bits: int = Field(8, ge=1, le=16)
    weighting: Weighting = "l1_prob"
    temperature: float = Field(1.0, gt=0)
    table_std: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _nothing_ignored(self) -> MemoryLayerConfig:
        if self.weighting != "prob" and self.temperature != 1.0:
            raise UserError("memory_layer: temperature has no effect with weighting l1_prob; set weighting: prob")
        return self

    def n_tables(self, d_in: int) -> int:
        """Tables for an input of width d_in; UserError where the pieces do not come out even."""
        if d_in % self.n_bits:
            allowed = ", ".join(str(n) for n in range(1, 17) if d_in % n == 0)
            raise UserError(
                f"memory_layer: an input of {d_in} cannot be cut into pieces of n_bits {self.n_bits}; set n_bits to "
                f"one of {allowed}, or give this role another linear"
            )
        return d_in // self.n_bits

    def init_std(self, std: float) -> float:
        """Standard deviation of tables whose outputs are as large as those of a dense layer of `std`."""
        if self.table_std is not None:
            return self.table_std
        return std * math.sqrt(self.n_bits / mean_square_weight(self.n_bits, self.weighting, self.temperature))

    def build(self, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig) -> MemoryLayer:
        return MemoryLayer(self, d_in, d_out, bias=bias, std=std, init=init)

    def cost(self, d_in: int, d_out: int, *, bias: bool) -> Cost:
        used = self.n_tables(d_in) * d_out
        biases = d_out if bias else 0
        return Cost(params=used * 2**self.n_bits + biases, active_params=used + biases, flops_per_token=2.0 * used)


class MemoryLayer(nn.Module):
    """tables [K, 2^n_bits, d_out], bias [d_out] or None."""

    def __init__(
        self, config: MemoryLayerConfig, d_in: int, d_out: int, *, bias: bool, std: float, init: InitConfig
    ) -> None:
        super().__init__()
        self.n_bits, self.weighting, self.temperature = config.n_bits, config.weighting, config.temperature
        self.tables = nn.Parameter(torch.empty(config.n_tables(d_in), 2**config.n_bits, d_out))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.std = config.init_std(std)
        self.init = init

    def forward(self, x: Tensor) -> Tensor:
        return self.look_up(*self.address(x)).to(compute_dtype(x.device, x.dtype))

    def address(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(row of each table [..., K] int64, its weight [..., K] in at least fp32) for an input [..., d_in]."""
        z = x.unflatten(-1, (-1, self.n_bits))
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        return hash_codes(z), hash_weights(wide, self.weighting, self.temperature)

    def look_up(self, codes: Tensor, weights: Tensor) -> Tensor:
        """Outputs [..., d_out] of addresses, in the dtype of the weights."""
        y = memory_lookup(self.tables, codes, weights)
        return y if self.bias is None else y + self.bias

    def project_all(self, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Outputs of several Memory Layers for one input, which is hashed once per way of hashing."""
        addresses: dict[Any, tuple[Tensor, Tensor]] = {}
        outputs = []
        for layer in layers:
            assert isinstance(layer, MemoryLayer)
            way = (layer.n_bits, layer.weighting, layer.temperature)
            if way not in addresses:
                addresses[way] = layer.address(x)
            outputs.append(layer.look_up(*addresses[way]).to(compute_dtype(x.device, x.dtype)))
        return tuple(outputs)

    def kernel_requests(self, device: torch.device, dtype: torch.dtype) -> list[tuple[str, Any]]:
        """What the self-test of kernels must cover: tables in fp32, or in what a strategy gathers them in."""
        return [("memory_layer", lookup_query(device, kind)) for kind in (torch.float32, dtype)]

    def init_spec(self) -> dict[str, Init]:
        return {"tables": linear_init(self.std, self.init), "bias": normal(BIAS_STD)}


@functools.cache
def mean_square_weight(n_bits: int, weighting: Weighting, temperature: float = 1.0) -> float:
    """Mean of p^2 over standard normal pieces. With a = |z| and g = sigmoid(2 a / temperature), independent over j, it
    is a product of means of g^2, and for l1_prob a sum over pairs of factors that also hold a."""
    step = 1e-3
    grid = [step * (i + 0.5) for i in range(12_000)]
    density = [2.0 * math.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi) * step for a in grid]
    g2 = [1.0 / (1.0 + math.exp(-2.0 * a / temperature)) ** 2 for a in grid]
    zero, one, two = (sum(a**power * g * w for a, g, w in zip(grid, g2, density)) for power in range(3))
    if weighting == "prob":
        return zero**n_bits
    pairs = n_bits * (n_bits - 1) * one * one * zero ** (n_bits - 2) if n_bits > 1 else 0.0
    return n_bits * two * zero ** (n_bits - 1) + pairs
