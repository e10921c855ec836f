"""Short causal convolution: each channel mixes its last few tokens, as recurrent mixers do before they remember."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm.core.cost import Cost
from llm.core.init import Init, constant, uniform
from llm.core.seq import SeqInfo
from llm.core.state import ConvState, valid_counts


class Tail:
    """The last width - 1 inputs x [B, width - 1, C] of rows that are read in pieces of equal length, with gradients."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def append(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """[B, width - 1 + T, C]: the inputs before x [B, T, C], and x."""
        assert counts is None
        joined = torch.cat([self.x, x], dim=1)
        self.x = joined[:, x.shape[1] :]
        return joined


class ShortConvolution(nn.Module):
    """y_t = act(Σ_{j < width} w_j ⊙ x_{t-j} + b) within the document: taps before its first token give nothing.

    weight [C, 1, width], the last tap is the present token's, as in torch's depthwise Conv1d (whose weights fit, and
    which optimizers take for no matrix); bias [C] or None.
    """

    def __init__(
        self, channels: int, width: int, *, activation: Literal["silu"] | None = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        assert channels >= 1 and width >= 1
        self.channels = channels
        self.width = width
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_spec(self) -> dict[str, Init]:
        bound = self.width**-0.5
        return {"weight": uniform(-bound, bound), "bias": constant(0.0)}

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        """Whole documents, x [B, T, C] -> [B, T, C]."""
        positions = seq.positions if seq.packed else None
        if torch.compiler.is_compiling():
            return self._convolve(F.pad(x, (0, 0, self.width - 1, 0)), positions)
        return _Convolve.apply(x, self.weight, self.bias, positions, self.activation)

    def extend(self, x: Tensor, seq: SeqInfo, state: ConvState | Tail) -> Tensor:
        """The tokens after those in `state`, which is advanced by the real ones: x [B, T, C] -> [B, T, C]."""
        return self._convolve(state.append(x, valid_counts(seq)).to(x.dtype), None)

    def new_tail(self, x: Tensor) -> Tail:
        """For rows as those of x [B, T, C], before their first token."""
        return Tail(x.new_zeros(x.shape[0], self.width - 1, self.channels))

    def new_state(
        self, batch: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> ConvState:
        """An empty state: the last width - 1 inputs."""
        return ConvState(batch, self.width, self.channels, n_tentative=n_tentative, dtype=dtype, device=device)

    def _convolve(self, history: Tensor, positions: Tensor | None) -> Tensor:
        """history [B, width - 1 + T, C], positions [B, T] where a row may hold several documents -> [B, T, C].

        Shifted multiply-adds: one fused pass when compiled.
        """
        past = self.width - 1
        length = history.shape[1] - past
        wide = torch.promote_types(history.dtype, torch.float32)
        taps = self.weight[:, 0].to(wide)
        y = history[:, past:] * taps[:, past]
        for back in range(1, self.width):
            shifted = history[:, past - back : past - back + length]
            if positions is not None:
                shifted = torch.where((positions >= back)[..., None], shifted, 0.0)
            y = y + shifted * taps[:, past - back]
        if self.bias is not None:
            y = y + self.bias.to(wide)
        return (F.silu(y) if self.activation == "silu" else y).to(history.dtype)


class _Convolve(torch.autograd.Function):
    """`ShortConvolution.forward` for eager code: half the time of torch's depthwise convolution on a CPU, and nothing
    but the input and what goes into the activation is kept for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None, activation: str | None
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs, taps = x.to(wide), weight[:, 0].t().to(wide)
        past = taps.shape[0] - 1
        y = inputs * taps[past]
        for back in range(1, min(past + 1, x.shape[1])):
            y[:, back:].addcmul_(_from_before(inputs, positions, back), taps[past - back])
        if bias is not None:
            y += bias.to(wide)
        ctx.save_for_backward(x, weight, positions, y.to(x.dtype) if activation == "silu" else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return (F.silu(y) if activation == "silu" else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, positions, before = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs, taps, grad = x.to(wide), weight[:, 0].t().to(wide), grad.to(wide)
        if before is not None:
            grad = torch.ops.aten.silu_backward(grad, before.to(wide))
        past = taps.shape[0] - 1
        d_taps = torch.zeros_like(taps)
        d_taps[past] = (grad * inputs).sum((0, 1))
        d_x = grad * taps[past]
        for back in range(1, min(past + 1, x.shape[1])):
            later = grad[:, back:]
            if positions is not None:
                later = torch.where((positions[:, back:] >= back)[..., None], later, 0.0)
            d_taps[past - back] = (later * inputs[:, :-back]).sum((0, 1))
            d_x[:, :-back].addcmul_(later, taps[past - back])
        d_bias = None if ctx.bias_dtype is None else grad.sum((0, 1)).to(ctx.bias_dtype)
        return d_x.to(x.dtype), d_taps.t()[:, None].to(weight.dtype), d_bias, None, None


def _from_before(x: Tensor, positions: Tensor | None, back: int) -> Tensor:
    """x [B, T, C] -> [B, T - back, C]: what the tokens from `back` on see that many places before them."""
    earlier = x[:, :-back]
    return earlier if positions is None else torch.where((positions[:, back:] >= back)[..., None], earlier, 0.0)


def short_conv_cost(channels: int, width: int, bias: bool, state_dtype_bytes: int) -> Cost:
    """What a ShortConvolution costs."""
    taps = channels * width
    params = taps + (channels if bias else 0)
    return Cost(
        params=params,
        active_params=params,
        flops_per_token=2.0 * taps,
        state_bytes_per_seq=channels * (width - 1) * state_dtype_bytes,
    )
