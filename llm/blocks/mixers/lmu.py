"""Legendre memory units as a token mixer (Chilkuri and Eliasmith 2021; LMUFormer, arXiv:2402.04882)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer, compute_dtype
from llm.blocks.channels.activations import ACTIVATIONS
from llm.blocks.legendre import LegendreMemory, memory_flops
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, RecurrentState, valid_counts

Activation = Literal["none", "relu", "gelu", "silu"]


class MemoryConfig(MixerConfig):
    """What mixers around a Legendre memory share.

    n_channels: scalar signals that are remembered (None: d_model / 16), each as `order` Legendre coefficients of its
    last `window` tokens. windows: the channels are divided among these in equal groups (None: 64, 256, 1024, ... as far
    as model.max_seq_len goes). unit: coefficients in units of their size under white noise, instead of the published
    ones, of which the late ones and those of long windows are small.
    chunk: tokens of a chunk in training and prefill.
    """

    n_channels: int | None = Field(None, ge=1)
    order: int = Field(16, ge=1)
    windows: tuple[float, ...] | None = Field(None, min_length=1)
    unit: bool = False
    chunk: int = Field(16, ge=1)

    def resolved(self, d_model: int, max_seq_len: int) -> tuple[int, tuple[float, ...]]:
        """(channels per window, windows)."""
        windows = self.windows
        if windows is None:
            windows = tuple(float(4**k) for k in range(3, 16) if 4**k <= max_seq_len) or (float(max_seq_len),)
        if min(windows) <= 0:
            raise UserError(f"{self.type}: windows are lengths in tokens and must be positive, not {min(windows):g}")
        if self.n_channels is not None and self.n_channels % len(windows):
            raise UserError(
                f"{self.type}: n_channels {self.n_channels} is not divisible by the {len(windows)} windows; "
                "change one of them"
            )
        n_channels = self.n_channels or max(1, d_model // 16)
        return -(-n_channels // len(windows)), windows

    def memory(self, ctx: BuildCtx) -> tuple[int, LegendreMemory]:
        """(all channels, their memory)."""
        per_window, windows = self.resolved(ctx.d_model, ctx.max_seq_len)
        memory = LegendreMemory(self.order, windows, chunk=self.chunk, max_len=ctx.max_seq_len, unit=self.unit)
        return per_window * len(windows), memory

    def memory_cost(self, dims: Dims, seq_len: int, mode: Mode) -> tuple[int, Cost]:
        """(all channels, cost of their memory and its state)."""
        per_window, windows = self.resolved(dims.d_model, dims.max_seq_len)
        n_channels = per_window * len(windows)
        if mode == "decode":
            flops = 2.0 * n_channels * self.order**2
        else:
            flops = memory_flops(self.order, n_channels, self.chunk, seq_len, stateful=mode == "prefill")
        state = n_channels * self.order * max(4, dims.state_dtype_bytes)
        return n_channels, Cost(flops_per_token=flops, state_bytes_per_seq=state)


@MIXERS.register(
    "lmu",
    tiny=lambda: LMUConfig(n_channels=4, order=6, windows=(6.0, 20.0), chunk=4),
    paper="arXiv:2402.04882 (LMUFormer); Voelker et al. 2019; Chilkuri and Eliasmith 2021",
    status="experimental",
    tinies={
        "fft": lambda: LMUConfig(n_channels=2, order=6, windows=(12.0,), form="fft", unit=True),
        "published": lambda: LMUConfig(
            n_channels=1, order=32, windows=(16.0,), read_in="relu", read_out="relu", chunk=8
        ),
        "memory_only": lambda: LMUConfig(
            n_channels=4, windows=(10.0,), order=8, skip=False, unit=True, bias=False, chunk=8
        ),
    },
    about=About(
        equation="m_t = A m_{t−1} + B f₁(W_u x_t + b_u) with fixed A, B; y_t = f₂(W_h [m_t; x_t] + b_h)",
        use="Streams and long sequences in constant memory: a few numbers per channel, with training in parallel.",
        weakness="What it remembers does not depend on content, and beyond its window it remembers nothing.",
    ),
)
class LMUConfig(MemoryConfig):
    """Legendre memories of n_channels signals, read out together with the token itself.

    read_in, read_out: activations f1 and f2. With n_channels 1, order d_model and both "relu" this is the published
    cell, whose read-in bias starts at 1 here: a ReLU that never opens leaves the layer without a memory.
    skip: the token itself stands beside its memory in the read-out. form: "fft" trains by convolution where a row is
    one document; everything else, and "chunked" always, goes by chunks.
    """

    read_in: Activation = "none"
    read_out: Activation = "none"
    skip: bool = True
    bias: bool = True
    form: Literal["chunked", "fft"] = "chunked"

    def build(self, ctx: BuildCtx) -> LMU:
        return LMU(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        n_channels, memory = self.memory_cost(dims, seq_len, mode)
        if self.form == "fft" and mode == "train":
            memory = Cost(state_bytes_per_seq=memory.state_bytes_per_seq)
        d = dims.d_model
        biases = n_channels if self.bias else 0
        return (
            dims.linear(d, n_channels, role="mixer.in")
            + dims.linear(n_channels * self.order + (d if self.skip else 0), d, role="mixer.out", bias=self.bias)
            + Cost(params=biases, active_params=biases)
            + memory
        )


class LMU(TokenMixer):
    """input [D -> W n], input_bias [W n], out [W n q + D -> D]; the state is m [W, n, q] in at least fp32."""

    caps = Caps(rollback="copies")

    def __init__(self, config: LMUConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.config = config
        self.n_channels, self.memory = config.memory(ctx)
        self.read_in, self.read_out = ACTIVATIONS.get(config.read_in), ACTIVATIONS.get(config.read_out)
        self.input = ctx.linear(ctx.d_model, self.n_channels, role="mixer.in")
        self.input_bias = nn.Parameter(torch.empty(self.n_channels)) if config.bias else None
        joined = self.n_channels * config.order + (ctx.d_model if config.skip else 0)
        self.out = ctx.linear(joined, ctx.d_model, role="mixer.out", bias=config.bias)

    def init_spec(self) -> dict[str, Init]:
        return {"input_bias": constant(1.0 if self.config.read_in == "relu" else 0.0)}

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        self.memory.prepare(seq, compute_dtype(seq.positions.device, dtype), fft=self._by_fft(seq))

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self._output(self.memory(self._signals(x), seq, fft=self._by_fft(seq)), x)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, RecurrentState)
        before = state.read()
        m = self.memory.extend(self._signals(x), seq, before["m"])
        write_states(state, before, {"m": m}, seq)
        return self._output(m, x)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        n_windows = len(self.memory.windows)
        shape = (n_windows, self.n_channels // n_windows, self.memory.order)
        wide = torch.promote_types(dtype, torch.float32)
        return RecurrentState(batch, {"m": shape}, n_tentative=n_tentative, dtype=wide, device=device)

    def _by_fft(self, seq: SeqInfo) -> bool:
        return self.config.form == "fft" and not seq.packed and seq.positions.shape[1] > 1

    def _signals(self, x: Tensor) -> Tensor:
        """u [B, T, W, n]."""
        u = self.input(x)
        if self.input_bias is not None:
            u = u + self.input_bias.to(u.dtype)
        u = self.read_in(u) if self.read_in is not None else u
        return u.unflatten(-1, (len(self.memory.windows), -1))

    def _output(self, m: Tensor, x: Tensor) -> Tensor:
        joined = m.flatten(2).to(x.dtype)
        y = self.out(torch.cat([joined, x], dim=-1) if self.config.skip else joined)
        return self.read_out(y) if self.read_out is not None else y


def write_states(state: RecurrentState, before: dict[str, Tensor], each: dict[str, Tensor], seq: SeqInfo) -> None:
    """Advance a state to after the last real token: before {name: [B, ...]} and each {name: [B, T, ...]}."""
    counts = valid_counts(seq)
    if counts is None:
        length = next(iter(each.values())).shape[1]
        state.write(
            {name: values[:, -1] for name, values in each.items()}, torch.full_like(state.length, length), each=each
        )
        return
    rows = torch.arange(len(counts), device=counts.device)
    final = {}
    for name, values in each.items():
        last = values[rows, (counts - 1).clamp(min=0)]
        final[name] = torch.where((counts > 0).view(-1, *[1] * (last.dim() - 1)), last, before[name])
    state.write(final, counts, each=each)
