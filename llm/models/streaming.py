"""Stages of models over frames that can run as the frames come in, with the same outputs.

x [B, N, C]: N frames of C channels. `forward` takes whole sequences. `extend` takes the frames that have come since the
last call, none or many, and gives those of its outputs that they complete: a convolution that looks ahead is late by
as many frames until `last` says that no more will come. A module that is no Stage acts on each frame by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.blocks.legendre import LegendreMemory
from llm.blocks.spiking import NeuronConfig, fire
from llm.core.init import Init, constant, normal, uniform
from llm.core.seq import SeqInfo


class Stage(nn.Module):
    """Base of stages; `lookahead` is how many frames its outputs are late."""

    lookahead: int = 0

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences."""
        raise NotImplementedError

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        """What it remembers before the first frame; to be changed in place by `extend`."""
        raise NotImplementedError

    def extend(self, x: Tensor, state: Any, last: bool) -> Tensor:
        """The next frames [B, n, C] -> the outputs that they complete [B, n', C']."""
        raise NotImplementedError


class Chain(Stage):
    """Stages and frame-wise modules in order."""

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.lookahead = sum(stage.lookahead for stage in stages if isinstance(stage, Stage))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> list[Any]:
        return [s.new_state(batch, dtype, device) if isinstance(s, Stage) else None for s in self.stages]

    def extend(self, x: Tensor, state: list[Any], last: bool) -> Tensor:
        for stage, own in zip(self.stages, state):
            x = stage.extend(x, own, last) if isinstance(stage, Stage) else stage(x)
        return x


class ResidualStage(Stage):
    """x + branch(x); frames wait for the outputs of a branch that is late."""

    def __init__(self, branch: Stage) -> None:
        super().__init__()
        self.branch = branch
        self.lookahead = branch.lookahead

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        return {"branch": self.branch.new_state(batch, dtype, device), "waiting": None}

    def extend(self, x: Tensor, state: dict[str, Any], last: bool) -> Tensor:
        waiting = x if state["waiting"] is None else torch.cat([state["waiting"], x], dim=1)
        y = self.branch.extend(x, state["branch"], last)
        state["waiting"] = waiting[:, y.shape[1] :]
        return waiting[:, : y.shape[1]] + y


class Convolution(Stage):
    """weight [out, in, width], bias [out] or None: as many outputs as frames, zeros beyond both ends. It looks as far
    ahead as back, or only back where it is causal."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        width: int = 1,
        *,
        bias: bool = False,
        causal: bool = False,
        init: tuple[Init, Init] | None = None,
    ) -> None:
        super().__init__()
        assert causal or width % 2, "a convolution that looks ahead as far as back has an odd width"
        self.width = width
        self.lookahead = 0 if causal else width // 2
        self.weight = nn.Parameter(torch.empty(d_out, d_in, width))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

        bound = (d_in * width) ** -0.5
        self.inits = init or (uniform(-bound, bound), uniform(-bound, bound))

    def init_spec(self) -> dict[str, Init]:
        return dict(zip(("weight", "bias"), self.inits))

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(F.pad(x, (0, 0, self.width - 1 - self.lookahead, self.lookahead)))

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        past = self.width - 1 - self.lookahead
        return {"past": torch.zeros(batch, past, self.weight.shape[1], dtype=dtype, device=device)}

    def extend(self, x: Tensor, state: dict[str, Tensor], last: bool) -> Tensor:
        frames = torch.cat([state["past"].to(x.dtype), x], dim=1)
        if last:
            frames = F.pad(frames, (0, 0, 0, self.lookahead))
        n_outputs = max(0, frames.shape[1] - (self.width - 1))
        state["past"] = frames[:, n_outputs:]
        return self._convolve(frames) if n_outputs else x.new_empty(x.shape[0], 0, self.weight.shape[0])

    def _convolve(self, frames: Tensor) -> Tensor:
        if self.width == 1:
            return F.linear(frames, self.weight[:, :, 0], self.bias)
        return F.conv1d(frames.mT, self.weight, self.bias).mT


class BatchNorm(nn.Module):
    """Normalises each channel over all frames of a batch when training, by running statistics otherwise."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def init_spec(self) -> dict[str, Init]:
        ones, zeros = constant(1.0), constant(0.0)
        return {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C]."""
        if not x.numel():
            return x
        statistics = (self.running_mean, self.running_var)
        flat = F.batch_norm(
            x.flatten(0, -2), *statistics, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return flat.view(x.shape)


class Neurons(Stage):
    """Leaky integrate-and-fire neurons, one per channel."""

    def __init__(self, config: NeuronConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return fire(x, self.config)[0]

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor | None]:
        return {"potential": None}

    def extend(self, x: Tensor, state: dict[str, Tensor | None], last: bool) -> Tensor:
        spikes, potentials = fire(x, self.config, potential=state["potential"])
        if x.shape[1]:
            state["potential"] = potentials[:, -1]
        return spikes


class LMUCell(Stage):
    """The published cell: u = act(W_u x + b_u), one signal; m its Legendre memory; h = act(W_h [m; x] + b_h).

    act is ReLU, or with `neuron` batch norm and neurons, which then read the memory too:
    h = LIF(BN(W_h [LIF(BN(m)); x])). A ReLU that no input opens would leave the cell without a memory for good, hence
    its b_u starts at 1.
    """

    def __init__(self, d_in: int, d_out: int, order: int, window: float, *, neuron: NeuronConfig | None = None) -> None:
        super().__init__()

        def act(channels: int) -> nn.Module:
            return nn.ReLU() if neuron is None else Chain(BatchNorm(channels), Neurons(neuron))

        bound = (3 / d_in) ** 0.5
        self.memory = LegendreMemory(order, (window,), chunk=16, max_len=max(1, int(window)))
        self.input = Convolution(
            d_in, 1, bias=True, init=(uniform(-bound, bound), constant(1.0 if neuron is None else 0.0))
        )
        self.hidden = Convolution(
            order + d_in, d_out, bias=True, init=(normal((2 / (order + d_in + d_out)) ** 0.5), constant(0.0))
        )
        self.act_input, self.act_hidden = act(1), act(d_out)
        self.act_memory = nn.Identity() if neuron is None else act(order)

    def forward(self, x: Tensor) -> Tensor:
        u = self.act_input(self.input(x))
        m = self.memory(u[:, :, None], SeqInfo.contiguous(*x.shape[:2], device=x.device), fft=x.shape[1] > 1)
        m = self.act_memory(m.flatten(2).to(x.dtype))
        return self.act_hidden(self.hidden(torch.cat([m, x], dim=-1)))

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        wide = torch.promote_types(dtype, torch.float32)
        state: dict[str, Any] = {"m": torch.zeros(batch, 1, 1, self.memory.order, dtype=wide, device=device)}
        for name in ("act_input", "act_memory", "act_hidden"):
            stage = getattr(self, name)
            state[name] = stage.new_state(batch, dtype, device) if isinstance(stage, Stage) else None
        return state

    def extend(self, x: Tensor, state: dict[str, Any], last: bool) -> Tensor:
        def act(name: str, values: Tensor) -> Tensor:
            stage = getattr(self, name)
            return stage.extend(values, state[name], last) if isinstance(stage, Stage) else stage(values)

        if not x.shape[1]:
            return x.new_empty(x.shape[0], 0, self.hidden.weight.shape[0])
        u = act("act_input", self.input(x))
        m = self.memory.extend(u[:, :, None], SeqInfo.contiguous(*x.shape[:2], device=x.device), state["m"])
        state["m"] = m[:, -1]
        m = act("act_memory", m.flatten(2).to(x.dtype))
        return act("act_hidden", self.hidden(torch.cat([m, x], dim=-1)))
