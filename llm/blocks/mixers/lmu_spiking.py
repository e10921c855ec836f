"""Legendre memory units with spiking neurons around a real-valued memory (LMUFormer, arXiv:2402.04882)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm.blocks.base import MIXERS, BuildCtx, Caps, TokenMixer, compute_dtype
from llm.blocks.mixers.lmu import MemoryConfig, write_states
from llm.blocks.spiking import NeuronConfig, fire, rests
from llm.core.cost import Cost, Dims, Mode
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, RecurrentState


@MIXERS.register(
    "lmu_spiking",
    tiny=lambda: _tiny(order=6, windows=(6.0, 20.0), chunk=4),
    paper="arXiv:2402.04882 (LMUFormer)",
    status="experimental",
    tinies={"one_window": lambda: _tiny(order=4, windows=(8.0,), unit=True)},
    exempt={
        "gradients": "A spike is a step function; its gradient is a surrogate, not what finite differences measure.",
    },
    about=About(
        equation="s = LIF(norm(x)), u = LIF(norm(W_u s)), m_t = A m_{t−1} + B u_t, "
        "h = LIF(norm(W_h [LIF(norm(m)); s])), y = W_o h",
        use="Models meant for neuromorphic hardware: all products but the memory's take inputs of 0 and 1.",
        weakness="Slower than the plain LMU on CPUs and GPUs: neurons go token by token. Gradients are surrogates.",
    ),
)
class SpikingLMUConfig(MemoryConfig):
    """The LMU cell in membrane-shortcut order: neurons stand before the products, the residual stream stays real.

    The memory is linear and real; its read-out alone is spikes. The model's norms stand where the paper has batch
    norm; the first is the block's own, so that neurons fire whatever the residual style. input_neuron fires on the
    token itself, neuron everywhere else.
    """

    input_neuron: NeuronConfig = NeuronConfig(threshold=0.5)
    neuron: NeuronConfig = NeuronConfig()

    def build(self, ctx: BuildCtx) -> SpikingLMU:
        return SpikingLMU(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        n_channels, memory = self.memory_cost(dims, seq_len, mode)
        d, remembered = dims.d_model, n_channels * self.order
        potentials = (2 * d + n_channels + remembered) * max(4, dims.state_dtype_bytes)
        return (
            dims.norm(d, role="mixer.norm")
            + dims.linear(d, n_channels, role="mixer.in", bias=True)
            + dims.norm(n_channels, role="mixer.in_norm")
            + dims.norm(remembered, role="mixer.memory_norm")
            + dims.linear(remembered + d, d, role="mixer.hidden", bias=True)
            + dims.norm(d, role="mixer.hidden_norm")
            + dims.linear(d, d, role="mixer.out", bias=True)
            + memory
            + Cost(state_bytes_per_seq=potentials)
        )


class SpikingLMU(TokenMixer):
    """input [D -> W n], hidden [W n q + D -> D], out [D -> D]; the state is m and the potentials of four layers."""

    caps = Caps(rollback="copies")

    def __init__(self, config: SpikingLMUConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.config = config
        d = ctx.d_model
        self.n_channels, self.memory = config.memory(ctx)
        remembered = self.n_channels * config.order
        self.norm = ctx.norm(d, role="mixer.norm")
        self.input = ctx.linear(d, self.n_channels, role="mixer.in", bias=True)
        self.input_norm = ctx.norm(self.n_channels, role="mixer.in_norm")
        self.memory_norm = ctx.norm(remembered, role="mixer.memory_norm")
        self.hidden = ctx.linear(remembered + d, d, role="mixer.hidden", bias=True)
        self.hidden_norm = ctx.norm(d, role="mixer.hidden_norm")
        self.out = ctx.linear(d, d, role="mixer.out", bias=True)
        n_windows = len(self.memory.windows)
        self.shapes: dict[str, tuple[int, ...]] = {
            "m": (n_windows, self.n_channels // n_windows, config.order),
            "x": (d,),
            "u": (self.n_channels,),
            "read": (remembered,),
            "h": (d,),
        }

    def prepare(self, seq: SeqInfo, dtype: torch.dtype) -> None:
        self.memory.prepare(seq, compute_dtype(seq.positions.device, dtype))

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self._run(x, seq, None)[0]

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, RecurrentState)
        before = state.read()
        y, each = self._run(x, seq, before)
        write_states(state, before, each, seq)
        return y

    def _run(self, x: Tensor, seq: SeqInfo, before: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(y, everything that the state holds, after each token)."""
        each: dict[str, Tensor] = {}
        keep = rests(seq) if before is None else None

        def spikes(name: str, values: Tensor, neuron: NeuronConfig) -> Tensor:
            fired, each[name] = fire(values, neuron, keep=keep, potential=None if before is None else before[name])
            return fired

        neuron = self.config.neuron
        token = spikes("x", self.norm(x), self.config.input_neuron)
        signals = spikes("u", self.input_norm(self.input(token)), neuron).unflatten(-1, (len(self.memory.windows), -1))
        each["m"] = self.memory(signals, seq) if before is None else self.memory.extend(signals, seq, before["m"])
        read = spikes("read", self.memory_norm(each["m"].flatten(2).to(x.dtype)), neuron)
        hidden = spikes("h", self.hidden_norm(self.hidden(torch.cat([read, token], dim=-1))), neuron)
        return self.out(hidden), each

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        wide = torch.promote_types(dtype, torch.float32)
        return RecurrentState(batch, self.shapes, n_tentative=n_tentative, dtype=wide, device=device)


def _tiny(**fields: Any) -> SpikingLMUConfig:
    """So few neurons are silent all at once, or all turned over by one step, unless they fire readily and softly."""
    soft = {
        "input_neuron": NeuronConfig(threshold=0.5, sharpness=2),
        "neuron": NeuronConfig(threshold=0.25, sharpness=2),
    }
    return SpikingLMUConfig.model_validate({"n_channels": 8} | soft | fields)
