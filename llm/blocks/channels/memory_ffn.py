"""The feed-forward layer of MemoryFormer (Ding et al. 2024): two Memory Layers with a norm between, no activation."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kernels.memory_layer.hashing import Weighting
from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer, NormConfig
from llm.blocks.linears.memory_layer import MemoryLayer, MemoryLayerConfig
from llm.blocks.norms import LayerNormConfig
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState


@CHANNELS.register(
    "memory_ffn",
    tiny=lambda: MemoryFFNConfig(n_bits=2, extra_bits=1),
    paper="arXiv:2411.12992",
    status="experimental",
    tinies={"tables": lambda: MemoryFFNConfig(n_bits=2, extra_bits=0, table_factor=2)},
    about=About(
        equation="y = M₂(norm(M₁ x)), M a Memory Layer: y = b + Σ_k p(z_k) T_k[signs of z_k]",
        use="With memory layers at q, k and v: a block whose only matrix products are those of attention.",
        weakness="4 to 8 times the parameters of an MLP of the same width, read at random; it wants about three times "
        "the learning rate of a dense block.",
    ),
)
class MemoryFFNConfig(ChannelConfig):
    """d_model is cut into K = d_model / n_bits pieces. The first Memory Layer puts out what the second one hashes: K *
    table_factor pieces of n_bits + extra_bits numbers (released sizes: 2 extra bits; or none and table_factor 2).

    norm: between the two; null for none. weighting, temperature, table_std: as of the linear memory_layer.
    """

    n_bits: int = Field(8, ge=1, le=16)
    extra_bits: int = Field(2, ge=0, le=8)
    table_factor: int = Field(1, ge=1)
    weighting: Weighting = "l1_prob"
    temperature: float = Field(1.0, gt=0)
    table_std: float | None = Field(None, ge=0)
    norm: NormConfig | None = LayerNormConfig()

    def layer(self, n_bits: int) -> MemoryLayerConfig:
        """The config of one of the two layers."""
        return MemoryLayerConfig(
            n_bits=n_bits, weighting=self.weighting, temperature=self.temperature, table_std=self.table_std
        )

    def layers(self, d_model: int) -> tuple[MemoryLayerConfig, int, MemoryLayerConfig]:
        """(first layer, width between, second layer)."""
        if d_model % self.n_bits:
            raise UserError(
                f"memory_ffn: d_model {d_model} cannot be cut into pieces of n_bits {self.n_bits}; change one of them"
            )
        bits = self.n_bits + self.extra_bits
        return self.layer(self.n_bits), d_model // self.n_bits * self.table_factor * bits, self.layer(bits)

    def build(self, ctx: BuildCtx) -> MemoryFFN:
        return MemoryFFN(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        first, between, second = self.layers(dims.d_model)
        cost = first.cost(dims.d_model, between, bias=True) + second.cost(between, dims.d_model, bias=True)
        return cost + (self.norm.cost(between) if self.norm is not None else Cost())


class MemoryFFN(ChannelMixer):
    """first, second: Memory Layers [D -> hidden], [hidden -> D], each with a bias; norm [hidden] or None."""

    first: MemoryLayer
    second: MemoryLayer

    def __init__(self, config: MemoryFFNConfig, ctx: BuildCtx) -> None:
        super().__init__()
        first, between, second = config.layers(ctx.d_model)
        for name, layer, d_in, d_out, role in (
            ("first", first, ctx.d_model, between, "channel.up"),
            ("second", second, between, ctx.d_model, "channel.down"),
        ):
            std = ctx.init_std(d_in, role)
            self.add_module(name, layer.build(d_in, d_out, bias=True, std=std, init=ctx.init))
        self.norm = config.norm.build(between) if config.norm is not None else None

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        # What lies between keeps the precision of the sums: rounding it to bf16 would flip signs near zero.
        hidden = self.first.look_up(*self.first.address(x))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.second.look_up(*self.second.address(hidden)).to(x.dtype)
