"""Contracts of channel mixers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from llm.blocks.base import MIXERS, BuildCtx, Caps, ChannelConfig, ChannelMixer, TokenMixer
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from tests.contracts.checks import mixers
from tests.contracts.checks.exemptions import Check
from tests.contracts.checks.harness import (
    D_MODEL,
    assert_near,
    assert_same,
    check_init,
    compiled_calls,
    context,
    count_flops,
    fill,
    gap,
    gradcheck,
    n_parameters,
    random,
    tiny_model,
    train,
)


def build_channel(config: ChannelConfig, dtype: torch.dtype = torch.float64) -> ChannelMixer:
    """The module, filled, in evaluation mode."""
    return fill(config.build(context()), dtype=dtype).eval()


class _AsMixer(TokenMixer):
    """A stateful channel mixer seen as a token mixer, so that the same contracts hold it."""

    caps = Caps()

    def __init__(self, channel: ChannelMixer) -> None:
        super().__init__()
        self.channel = channel

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        return self.channel(x, seq)

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        return self.channel(x, seq, state)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        state = self.channel.new_state(batch, capacity, n_tentative=n_tentative, dtype=dtype, device=device)
        assert state is not None
        return state


class _AsMixerConfig:
    def __init__(self, config: ChannelConfig) -> None:
        self.config = config

    def build(self, ctx: BuildCtx) -> _AsMixer:
        return _AsMixer(self.config.build(ctx))


def is_stateful(config: ChannelConfig) -> bool:
    """Whether the channel mixer declares a decode state, hence is no function of single tokens."""
    return config.build(context()).new_state(1, 8, dtype=torch.float32, device="cpu") is not None


def check_token_wise(config: ChannelConfig) -> None:
    """Permuted tokens give permuted outputs, and neither the batch nor the document boundaries matter."""
    if is_stateful(config):
        return
    channel = build_channel(config)
    x = random(2, 9, D_MODEL)
    seq = SeqInfo.contiguous(2, 9)
    with torch.no_grad():
        y = channel(x, seq)
        order = torch.tensor([4, 0, 8, 2, 1, 7, 3, 6, 5])
        assert_same(channel(x[:, order], seq), y[:, order], "permuted tokens")
        assert_same(channel(x, SeqInfo.from_lengths([[4, 5], [9]], 9)), y, "packed documents")
        alone = torch.stack([channel(x[:1, t : t + 1], SeqInfo.contiguous(1, 1, start=t))[0, 0] for t in range(9)])
        assert_same(alone, y[0], "tokens one at a time")
    assert gap(y[:, :1].expand_as(y), y) > 1e-6, "all tokens have the same output"


def check_stateful(name: str, config: ChannelConfig) -> None:
    """A channel mixer with a decode state passes the token mixers' contract of this name."""
    if is_stateful(config):
        mixers.MIXER_CHECKS[name](_AsMixerConfig(config))


def check_gradients(config: ChannelConfig) -> None:
    """Analytic gradients agree with finite differences in float64."""
    seq = SeqInfo.contiguous(1, 4)
    gradcheck(build_channel(config), lambda channel, x: channel(x, seq), random(1, 4, D_MODEL))


def check_params_cost(config: ChannelConfig) -> None:
    """cost() counts the parameters of the built module."""
    mixers.check_params_cost(config)  # type: ignore[arg-type]


def check_flops_cost(config: ChannelConfig) -> None:
    """FLOPs of cost() lie between 0.9 times the counted contractions and 1.1 times those with element-wise work."""
    channel = build_channel(config, torch.float32)
    x = random(2, 32, D_MODEL, dtype=torch.float32)
    contractions, elementwise = count_flops(lambda: channel(x, SeqInfo.contiguous(2, 32)))
    stated = config.cost(context().dims(), 32, "train").flops_per_token * 64
    low, high = 0.9 * contractions, 1.1 * (contractions + elementwise)
    assert low <= stated <= high, f"FLOPs: cost() says {stated:.0f}, counted {low:.0f} to {high:.0f}"


def check_bf16(config: ChannelConfig) -> None:
    """bf16 parameters and autocast stay near float32."""
    x = random(2, 32, D_MODEL, dtype=torch.float32)
    seq = SeqInfo.contiguous(2, 32)
    with torch.no_grad():
        channel = build_channel(config, torch.float32)
        exact = channel(x, seq)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(channel(x, seq), exact, "bf16 autocast against float32")
        low = build_channel(config, torch.bfloat16)(x.bfloat16(), seq)
        assert low.dtype == torch.bfloat16, f"bf16 in, {low.dtype} out"
        assert_near(low, exact, "bf16 parameters against float32")


def check_compile(config: ChannelConfig) -> None:
    """No graph break, and one graph for several batches of one shape, in training mode."""
    channel = build_channel(config, torch.float32).train()
    calls = [(random(2, 12, D_MODEL, seed=s, dtype=torch.float32), SeqInfo.contiguous(2, 12)) for s in range(3)]
    expected = [channel(*call) for call in calls]
    outputs, graphs = compiled_calls(channel, calls)
    assert graphs == 1, f"{graphs} graphs were compiled for {len(calls)} batches of one shape"
    for output, wanted in zip(outputs, expected):
        assert_same(output, wanted, "compiled output", 1e-4)


def check_initial_values(config: ChannelConfig) -> None:
    """Init by name covers every parameter and buffer, is finite, and does not depend on how the module was built."""
    check_init(lambda: config.build(context()))


def check_submodel(config: ChannelConfig) -> None:
    """Where `submodel(fraction)` exists: the whole is the module, a part is smaller and shares its storage."""
    channel: Any = build_channel(config)
    if not hasattr(channel, "submodel"):
        return
    x, seq = random(2, 5, D_MODEL), SeqInfo.contiguous(2, 5)
    with torch.no_grad():
        assert_same(channel.submodel(1.0)(x, seq), channel(x, seq), "the whole as a sub-model")
        half = channel.submodel(0.5)
        assert n_parameters(half) < n_parameters(channel), "half of it has as many parameters"
        before = half(x, seq)
        owned = {p.untyped_storage().data_ptr() for p in channel.parameters()}
        assert all(p.untyped_storage().data_ptr() in owned for p in half.parameters()), "the sub-model is a copy"
        for p in channel.parameters():
            p.mul_(1.5)
        assert gap(half(x, seq), before) > 1e-6, "the sub-model does not follow its parent"


def check_overfits(config: ChannelConfig) -> None:
    """A tiny decoder with this channel mixer learns one batch by heart; every parameter of a dense one learns."""
    model = tiny_model(MIXERS.entry("attention").tiny(), config).build("cpu")
    initialise(model, 0)
    start, end = train(model, 80)
    assert end < 0.25 * start, f"the loss on one batch went from {start:.3f} to {end:.3f} only"


_STATEFUL = (
    "causality",
    "packing",
    "prefill_and_steps",
    "ragged_prefill",
    "commit",
    "abort",
    "reorder",
    "export_restore",
)

CHANNEL_CHECKS: dict[str, Check] = {
    "token_wise": check_token_wise,
    **{name: functools.partial(check_stateful, name) for name in _STATEFUL},
    "gradients": check_gradients,
    "params_cost": check_params_cost,
    "flops_cost": check_flops_cost,
    "bf16": check_bf16,
    "compile": check_compile,
    "init": check_initial_values,
    "submodel": check_submodel,
    "overfits": check_overfits,
}
