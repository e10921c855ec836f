"""Simplified linear attention (SLAB) in a causal form: ReLU features, and a short convolution of the values beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from llm.blocks.base import MIXERS, BuildCtx, MixerConfig, TokenMixer
from llm.blocks.feature_attention import Factors, FeatureAttention, feature_cost, head_width, to_heads
from llm.blocks.linears.dense import project
from llm.blocks.positions import positions_within
from llm.core.cost import Cost, Dims, Mode
from llm.core.init import Init, constant, uniform
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState, valid_counts


@MIXERS.register(
    "simplified_linear_attention",
    tiny=lambda: SimplifiedLinearAttentionConfig(n_heads=2),
    paper="arXiv:2405.11582",
    status="experimental",
    tinies={
        "key_positions": lambda: SimplifiedLinearAttentionConfig(n_heads=2, key_positions=True, bias=False),
        "no_conv": lambda: SimplifiedLinearAttentionConfig(n_heads=2, conv_width=None, d_head=12),
    },
    about=About(
        equation="o_t = q_t Σ_{s ≤ t} k_s v_sᵀ / (q_t · Σ_{s ≤ t} k_s) + Σ_j w_j ⊙ v_{t−j}, q and k after a ReLU",
        use="The plainest linear attention with a constant state; small and cheap to read and to run.",
        weakness="Published for images, without a causal mask: this causal form is ours. No decay and no gate, so a "
        "long context blurs; recall is far below softmax attention.",
    ),
)
class SimplifiedLinearAttentionConfig(MixerConfig):
    """Linear attention with ReLU features.

    d_head: None for d_model / n_heads. conv_width: taps of the depthwise convolution of the values, one kernel [d_head,
    width] for all heads; None for none. key_positions: a learned table [max_seq_len, n_heads * d_head], zero at first,
    added to the keys before the ReLU. bias: on all four projections.
    """

    n_heads: int = Field(ge=1)
    d_head: int | None = Field(None, ge=1)
    conv_width: int | None = Field(5, ge=2)
    key_positions: bool = False
    bias: bool = True

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return SimplifiedLinearAttention(self, ctx)

    def longest(self, max_seq_len: int) -> int | None:
        return max_seq_len if self.key_positions else None

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d_head = head_width(self.type, dims.d_model, self.n_heads, self.d_head)
        inner = self.n_heads * d_head
        cost = sum((dims.linear(dims.d_model, inner, role=f"mixer.{r}", bias=self.bias) for r in "qkv"), Cost())
        cost = cost + dims.linear(inner, dims.d_model, role="mixer.out", bias=self.bias)
        cost = cost + feature_cost(self.n_heads, d_head, d_head, seq_len, mode, dims.state_dtype_bytes)
        if self.key_positions:
            cost = cost + Cost(params=dims.max_seq_len * inner, active_params=inner)
        if self.conv_width is not None:
            params = d_head * (self.conv_width + 1)
            past = inner * (self.conv_width - 1) * dims.state_dtype_bytes
            flops = 2.0 * inner * self.conv_width
            cost = cost + Cost(params, params, flops_per_token=flops, state_bytes_per_seq=past)
        return cost


class SharedConvolution(nn.Module):
    """A causal depthwise convolution, the same for all heads: x [B, T, H * C], weight [C, 1, width], bias [C]."""

    def __init__(self, n_heads: int, channels: int, width: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        """Whole documents."""
        return self._convolve(F.pad(x, (0, 0, self.width - 1, 0)), seq.positions if seq.packed else None)

    def extend(self, x: Tensor, seq: SeqInfo, state: ConvState) -> Tensor:
        """The tokens after those in `state`, which is advanced by the real ones."""
        return self._convolve(state.append(x, valid_counts(seq)).to(x.dtype), None)

    def _convolve(self, history: Tensor, positions: Tensor | None) -> Tensor:
        """history [B, width - 1 + T, H * C] -> [B, T, H * C]; taps before a document's start give nothing."""
        past = self.width - 1
        length = history.shape[1] - past
        heads = history.unflatten(-1, (-1, self.weight.shape[0]))
        taps = self.weight[:, 0].to(history.dtype)
        y = heads[:, past:] * taps[:, past] + self.bias.to(history.dtype)
        for back in range(1, self.width):
            earlier = heads[:, past - back : past - back + length]
            if positions is not None:
                earlier = torch.where((positions >= back)[..., None, None], earlier, 0.0)
            y = y + earlier * taps[:, past - back]
        return y.flatten(2)

    def new_state(
        self, batch: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> ConvState:
        """An empty state: the last width - 1 inputs of all heads."""
        channels = self.n_heads * self.weight.shape[0]
        return ConvState(batch, self.width, channels, n_tentative=n_tentative, dtype=dtype, device=device)

    def init_spec(self) -> dict[str, Init]:
        bound = self.width**-0.5
        return {"weight": uniform(-bound, bound), "bias": constant(0.0)}


class SimplifiedLinearAttention(FeatureAttention):
    """q, k, v [D -> H * d], conv [d, 1, width], key_position [max_seq_len, H * d], out [H * d -> D]."""

    def __init__(self, config: SimplifiedLinearAttentionConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.d_head = self.d_feature = head_width(config.type, ctx.d_model, config.n_heads, config.d_head)
        inner = self.n_heads * self.d_head
        self.q, self.k, self.v = (
            ctx.linear(ctx.d_model, inner, role=f"mixer.{role}", bias=config.bias) for role in "qkv"
        )
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out", bias=config.bias)
        width = config.conv_width
        self.conv = SharedConvolution(self.n_heads, self.d_head, width) if width is not None else None
        self.key_position = nn.Parameter(torch.empty(ctx.max_seq_len, inner)) if config.key_positions else None

    def features(self, x: Tensor, seq: SeqInfo) -> Factors:
        q, k, v = project(x, self.q, self.k, self.v)
        if self.key_position is not None:
            k = k + F.embedding(
                positions_within(seq, self.key_position.shape[0], "the table of key positions"), self.key_position
            )
        return {"q": F.relu(to_heads(q, self.d_head)), "k": F.relu(to_heads(k, self.d_head)),
                "v": to_heads(v, self.d_head)}  # fmt: skip

    def _run(self, x: Tensor, seq: SeqInfo, state: DecodeState | None) -> Tensor:
        assert state is None or isinstance(state, CompositeState)
        factors = self.features(x, seq)
        sums = self.remember(factors, seq, None if state is None else state["sums"])
        outputs = self.finish(sums, factors, seq).flatten(2)
        if self.conv is not None:
            v = factors["v"].flatten(2)
            past = None if state is None else state["values"]
            assert past is None or isinstance(past, ConvState)
            outputs = outputs + (self.conv(v, seq) if past is None else self.conv.extend(v, seq, past))
        return self.out(outputs.to(x.dtype))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        sums = super().new_state(batch, capacity, n_tentative=n_tentative, dtype=dtype, device=device)
        parts: dict[str, DecodeState] = {"sums": sums}
        if self.conv is not None:
            parts["values"] = self.conv.new_state(batch, n_tentative=n_tentative, dtype=dtype, device=device)
        return CompositeState(parts)

    def init_spec(self) -> dict[str, Init]:
        return {"key_position": constant(0.0)}
