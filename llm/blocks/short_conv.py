"""Short causal convolution: each channel mixes its last few tokens, as recurrent mixers do before they remember."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.core.cost import Cost
from llm.core.init import Init, constant, uniform
from llm.core.seq import SeqInfo
from llm.core.state import ConvState, valid_counts


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
        history = F.pad(x, (0, 0, self.width - 1, 0))
        return self._convolve(history, seq.positions if seq.packed else None)

    def extend(self, x: Tensor, seq: SeqInfo, state: ConvState) -> Tensor:
        """The tokens after those in `state`, which is advanced by the real ones: x [B, T, C] -> [B, T, C]."""
        return self._convolve(state.append(x, valid_counts(seq)).to(x.dtype), None)

    def new_state(
        self, batch: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> ConvState:
        """An empty state: the last width - 1 inputs."""
        return ConvState(batch, self.width, self.channels, n_tentative=n_tentative, dtype=dtype, device=device)

    def _convolve(self, history: Tensor, positions: Tensor | None) -> Tensor:
        """history [B, width - 1 + T, C], positions [B, T] where a row may hold several documents -> [B, T, C].

        Shifted multiply-adds: faster than torch's depthwise convolution on a CPU, and one fused pass when compiled.
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
