"""The linear transformer: causal attention with the feature map elu(x) + 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.feature_attention import Factors, FeatureAttention, feature_cost, head_width, slopes_of, to_heads
from llm.blocks.linears.dense import project
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo


@MIXERS.register(
    "linear_transformer",
    tiny=lambda: LinearTransformerConfig(n_heads=2),
    paper="Katharopoulos et al. 2020 (arXiv:2006.16236)",
    status="experimental",
    tinies={"narrow": lambda: LinearTransformerConfig(n_heads=2, d_head=12, bias=True)},
    about=About(
        equation="o_t = φ(q_t) Σ_{s ≤ t} φ(k_s) v_sᵀ / (φ(q_t) · Σ_{s ≤ t} φ(k_s)), φ(x) = elu(x) + 1",
        use="The baseline of linear attention: no decay, no gate, no convolution.",
        weakness="Every earlier token keeps some weight, so a long context blurs; recall is weak.",
    ),
)
class LinearTransformerConfig(MixerConfig):
    """Linear attention with elu(x) + 1; rotary positions turn q and k before the map, ALiBi makes weights decay."""

    n_heads: int = Field(ge=1)
    d_head: int | None = Field(None, ge=1)
    bias: bool = False

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return LinearTransformer(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d_head = head_width(self.type, dims.d_model, self.n_heads, self.d_head)
        inner = self.n_heads * d_head
        cost = sum((dims.linear(dims.d_model, inner, role=f"mixer.{r}", bias=self.bias) for r in "qkv"), Cost())
        cost = cost + dims.linear(inner, dims.d_model, role="mixer.out", bias=self.bias)
        return cost + feature_cost(self.n_heads, d_head, d_head, seq_len, mode, dims.state_dtype_bytes)


class LinearTransformer(FeatureAttention):
    """q, k, v [D -> H * d], out [H * d -> D]."""

    caps = Caps(rollback="replay", needs_positions=True)

    def __init__(self, config: LinearTransformerConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.d_head = self.d_feature = head_width(config.type, ctx.d_model, config.n_heads, config.d_head)
        inner = self.n_heads * self.d_head
        self.q, self.k, self.v = (
            ctx.linear(ctx.d_model, inner, role=f"mixer.{role}", bias=config.bias) for role in "qkv"
        )
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out", bias=config.bias)
        self.position = ctx.position()
        self.position.for_heads(self.d_head)
        self.slopes = slopes_of(self.position, self.n_heads)

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        self.position.prepare(seq, torch.promote_types(dtype, torch.float32))

    def features(self, x: torch.Tensor, seq: SeqInfo) -> Factors:
        q, k, v = (to_heads(y, self.d_head) for y in project(x, self.q, self.k, self.v))
        q, k = self.position.at_qk(q, k, seq)
        return {"q": F.elu(q) + 1, "k": F.elu(k) + 1, "v": v}
