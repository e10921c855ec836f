"""LMU mixers, spiking neurons, the convolutional channel mixer and embedding, beyond what the contracts ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.blocks.channels.conv_channel import ConvChannelConfig, SpikingConvChannelConfig
from llm.blocks.legendre import discretise
from llm.blocks.mixers.conv_embed import ConvEmbedConfig
from llm.blocks.mixers.lmu import LMUConfig
from llm.blocks.mixers.lmu_spiking import SpikingLMUConfig
from llm.blocks.norms import RMSNormConfig
from llm.blocks.spiking import NeuronConfig, fire
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

D = 32


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(mixer: Any, x: Tensor, lengths: list[list[int]] | None = None) -> Tensor:
    batch, length = x.shape[:2]
    seq = SeqInfo.contiguous(batch, length) if lengths is None else SeqInfo.from_lengths(lengths, length)
    mixer.prepare(seq, x.dtype)
    return mixer(x, seq)


def test_the_published_cell() -> None:
    """One channel, ReLU in and out: u = relu(w x + b), m = A m + B u, h = relu(W [m; x] + b), written out."""
    config = LMUConfig(n_channels=1, order=D, windows=(16.0,), read_in="relu", read_out="relu")
    mixer = ready(config.build(context(D)))
    assert sum(p.numel() for p in mixer.parameters()) == (D + 1) + D * (D + D) + D
    x = randn(2, 19, D)
    transition, drive = discretise(D, 16.0)
    m = torch.zeros(2, D, dtype=torch.float64)
    for t in range(19):
        u = (x[:, t] @ mixer.input.weight[0] + mixer.input_bias).relu()
        m = m @ transition.T + u[:, None] * drive
        wanted = (torch.cat([m, x[:, t]], dim=-1) @ mixer.out.weight.T + mixer.out.bias).relu()
        torch.testing.assert_close(run(mixer, x)[:, t], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_forms_agree_with_their_gradients(chunk: int) -> None:
    """FFT, chunks of any size, prefill and steps: outputs; the two training forms: all gradients."""
    fields: dict[str, Any] = {"n_channels": 4, "order": 8, "windows": (6.0, 40.0), "read_in": "silu"}
    first = ready(LMUConfig(form="fft", **fields).build(context(D)))
    second = LMUConfig(chunk=chunk, **fields).build(context(D)).double()
    initialise(second, 0)
    second.load_state_dict(first.state_dict())
    x = randn(2, 37, D).requires_grad_()
    upstream = randn(2, 37, D, seed=1)
    wanted = run(first, x)
    found = run(second, x)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    grads = [
        torch.autograd.grad(y, [x, *mixer.parameters()], upstream) for y, mixer in ((wanted, first), (found, second))
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)
    state = second.new_state(2, 37, dtype=torch.float64, device="cpu")
    parts, start = [], 0
    with torch.no_grad():
        for n in (1, 17, 1, 18):
            parts.append(second.prefill(x[:, start : start + n], SeqInfo.contiguous(2, n, start=start), state))
            start += n
    torch.testing.assert_close(torch.cat(parts, 1), wanted.detach(), rtol=1e-11, atol=1e-11)


def test_packed_rows_never_go_by_fft() -> None:
    mixer = ready(LMUConfig(n_channels=2, order=6, windows=(12.0,), form="fft").build(context(D)))
    x = randn(1, 20, D)
    alone = torch.cat([run(mixer, part) for part in x.split([7, 13], dim=1)], dim=1)
    torch.testing.assert_close(run(mixer, x, [[7, 13]]), alone, rtol=1e-10, atol=1e-10)


def test_windows_by_default_and_state_of_constant_size() -> None:
    config = LMUConfig()
    assert config.resolved(512, 8192) == (8, (64.0, 256.0, 1024.0, 4096.0))
    assert config.resolved(512, 64) == (32, (64.0,))
    assert config.resolved(512, 50) == (32, (50.0,))
    mixer = config.build(context(D, max_seq_len=1024))
    sizes = {mixer.new_state(1, capacity, dtype=torch.float32, device="cpu").nbytes() for capacity in (8, 8192)}
    assert sizes == {3 * 16 * 4}


def test_flops_grow_linearly() -> None:
    """Doubling the context adds one hop between chunks to the cost of a token, nothing else."""
    dims = context(D, max_seq_len=65536).dims()
    costs = [LMUConfig(windows=(64.0,)).cost(dims, length, "train").flops_per_token for length in (1024, 2048, 65536)]
    assert costs[1] - costs[0] < 0.03 * costs[0] and costs[2] < 1.25 * costs[0]


def test_a_relu_read_in_starts_open() -> None:
    """A read-in that is negative for every input would leave the layer without a memory for good."""
    for seed in range(20):
        mixer = LMUConfig(n_channels=1, windows=(16.0,), read_in="relu").build(context(D))
        initialise(mixer, seed)
        x = randn(4, 50, D, seed=seed, dtype=torch.float32)
        signals = F.relu(mixer.input(x) + mixer.input_bias)
        assert (signals > 0).float().mean() > 0.2, seed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_channels": 3, "windows": (8.0, 16.0)}, "n_channels 3 is not divisible by the 2 windows"),
        ({"windows": (8.0, -1.0)}, "must be positive, not -1"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    for kind in (LMUConfig, SpikingLMUConfig):
        with pytest.raises(ValueError, match=message):
            kind(**fields).build(context(D))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, sharpness: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(v)
        ctx.sharpness = sharpness
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        s = torch.sigmoid(ctx.sharpness * ctx.saved_tensors[0])
        return grad * ctx.sharpness * s * (1 - s), None


def neurons_written_out(x: Tensor, neuron: NeuronConfig, keep: Tensor) -> Tensor:
    """One operation at a time, for autograd."""
    v = torch.zeros_like(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        v = v * keep[:, t, None]
        v = v + (x[:, t] - v) / neuron.tau
        s = _Step.apply(v - neuron.threshold, neuron.sharpness)
        v = v * (1 - s.detach())
        out.append(s)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("neuron", [NeuronConfig(), NeuronConfig(tau=1.5, threshold=0.4, sharpness=2.0)])
def test_neurons_and_their_surrogate_gradient(neuron: NeuronConfig) -> None:
    x = (2 * randn(2, 40, 5)).requires_grad_()
    keep = SeqInfo.from_lengths([[9, 31], [40]], 40).starts().logical_not()
    wanted = neurons_written_out(x, neuron, keep.double())
    found, potential = fire(x, neuron, keep=keep)
    assert torch.equal(found, wanted.detach()) and set(found.unique().tolist()) == {0.0, 1.0}
    upstream = randn(2, 40, 5, seed=3)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (found, wanted)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    first, middle = fire(x[:, :17], neuron, keep=keep[:, :17])
    second, last = fire(x[:, 17:], neuron, keep=keep[:, 17:], potential=middle[:, -1])
    assert torch.equal(torch.cat([first, second], 1), found) and torch.equal(last, potential[:, 17:])


def test_neurons_at_constant_input() -> None:
    """Below the threshold they never fire; at twice the threshold with tau 2 at every token."""
    for level, rate in ((0.999, 0.0), (2.0, 1.0)):
        spikes, _ = fire(torch.full((1, 200, 1), level), NeuronConfig())
        assert float(spikes.mean()) == rate


@pytest.mark.parametrize("kind", ["lmu_spiking", "conv_channel_spiking"])
def test_products_take_spikes_alone(kind: str) -> None:
    """Every linear layer but the memory's reads 0 and 1."""
    config: Any = SpikingLMUConfig(n_channels=4) if kind == "lmu_spiking" else SpikingConvChannelConfig(width=1)
    module = ready(config.build(context(D)))
    seen: dict[str, Tensor] = {}
    for name, linear in module.named_children():
        if name in ("input", "hidden", "out", "up", "down"):
            linear.register_forward_hook(lambda m, args, y, name=name: seen.update({name: args[0]}))
    seq = SeqInfo.contiguous(2, 50)
    y = module(randn(2, 50, D), seq)
    assert len(seen) == (3 if kind == "lmu_spiking" else 2)
    for name, values in seen.items():
        assert set(values.unique().tolist()) == {0.0, 1.0}, name
    assert y.unique().numel() > 2


def test_the_published_channel_mixer_is_two_products() -> None:
    """d to 4 d to d with a norm after each, GELU between and ReLU behind; token by token, hence without a state."""
    channel = ready(ConvChannelConfig(width=1, closing=True).build(context(D)))
    x = randn(2, 5, D)
    hidden = F.gelu(channel.hidden_norm(x @ channel.up.weight.T + channel.up.bias))
    wanted = F.relu(channel.norm(hidden @ channel.down.weight.T + channel.down.bias))
    torch.testing.assert_close(channel(x, SeqInfo.contiguous(2, 5)), wanted)
    assert channel.new_state(1, 8, dtype=torch.float32, device="cpu") is None


def test_full_convolution_equals_torch() -> None:
    """The stack through torch's Conv1d with the same weights, padded on the left."""
    config = ConvEmbedConfig(n_convs=2, width=3)
    mixer = ready(config.build(context(D, norm_config=RMSNormConfig())))
    x = randn(2, 11, D)

    def conv(index: int, z: Tensor) -> Tensor:
        weight = mixer.convs[index].linear.weight.view(D, 3, D).transpose(1, 2)
        return F.conv1d(F.pad(z.mT, (2, 0)), weight).mT

    z = x
    for index in range(2):
        z = mixer.norms[index](F.relu(conv(index, z)))
    torch.testing.assert_close(mixer(x, SeqInfo.contiguous(2, 11)), z + conv(2, z))


def test_conv_embed_reaches_just_as_far_as_it_says() -> None:
    """(n + 1)(width - 1) tokens back."""
    mixer = ready(ConvEmbedConfig(n_convs=2, width=3).build(context(D)))
    x = randn(1, 15, D).requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x, SeqInfo.contiguous(1, 15))[0, -1].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).tolist() == [False] * 8 + [True] * 7
