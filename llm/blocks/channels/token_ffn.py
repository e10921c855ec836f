"""The feed-forward layer of TokenFormer (Wang et al. 2024): one Pattention over four times as many tokens."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from llm.blocks.base import CHANNELS, BuildCtx, ChannelConfig, ChannelMixer
from llm.blocks.linears.pattention import Approximate, Normalization, PattentionConfig
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState


@CHANNELS.register(
    "token_ffn",
    tiny=lambda: TokenFFNConfig(n_tokens=24),
    paper="arXiv:2410.23168",
    status="experimental",
    about=About(
        equation="y = GELU(τ a / ‖a‖₂) V, a = x Kᵀ over n parameter tokens (K, V): an MLP with a norm in its middle",
        use="With pattention as the linear of attention: a block that grows by parameter tokens alone.",
        weakness="No gate; the scores of all tokens are held for the backward pass.",
    ),
)
class TokenFFNConfig(ChannelConfig):
    """n_tokens: None for 4 times the model width. The other keys are those of the linear pattention."""

    n_tokens: int | None = Field(None, ge=1)
    normalization: Normalization = "l2_norm_gelu"
    approximate: Approximate = "none"
    tau2: int | None = Field(None, ge=1)
    key_std: float | None = Field(None, gt=0)
    value_std: float | None = Field(None, ge=0)

    def layer(self, d_model: int) -> PattentionConfig:
        """The config of the layer."""
        same = {name: getattr(self, name) for name in PattentionConfig.model_fields if name not in ("type", "n_tokens")}
        return PattentionConfig(n_tokens=self.n_tokens or 4 * d_model, **same)

    def build(self, ctx: BuildCtx) -> TokenFFN:
        return TokenFFN(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        return self.layer(dims.d_model).cost(dims.d_model, dims.d_model, bias=False)


class TokenFFN(ChannelMixer):
    """tokens: Pattention [D -> D]."""

    def __init__(self, config: TokenFFNConfig, ctx: BuildCtx) -> None:
        super().__init__()
        d_model = ctx.d_model
        std = ctx.init_std(d_model, "channel.down")
        self.tokens = config.layer(d_model).build(d_model, d_model, bias=False, std=std, init=ctx.init)

    def forward(self, x: Tensor, seq: SeqInfo, state: DecodeState | None = None) -> Tensor:
        return self.tokens(x)
