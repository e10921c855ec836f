"""MatFormer: slices against cut models, masks against slices, gradients of both objectives, draws, compiled graphs."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.blocks.channels.activations import ACTIVATIONS
from llm.blocks.channels.nested import NestedGatedConfig, NestedMLPConfig, at_granularity, units
from llm.blocks.linears.dense import DenseLinear
from llm.checkpoint.hf.build import build_model
from llm.config.load import validate
from llm.core.batch import Microbatch
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.extract import extract, plain_config
from llm.models.nesting import SliceOptions, at_widths, nested_channels, set_widths, whole_widths
from llm.models.wrappers.nested import NestedTrainingConfig, draw
from llm.parallel import compile as compiling
from llm.parallel.activation_checkpointing import checkpoint_blocks
from llm.train.loss import LanguageModelLoss
from tests.unit.blocks.helpers import context, ready

D, HIDDEN, VOCAB = 32, 48, 23
SHARES = (0.125, 0.25, 0.5, 1.0)
MLP = {"type": "nested_mlp", "d_hidden": HIDDEN, "bias": True}
GATED = {"type": "nested_gated", "d_hidden": HIDDEN}
SEQ = SeqInfo.contiguous(2, 9)


def config(channel: Any = MLP, n_layers: int = 2, **changes: Any) -> ModelConfig:
    """A small decoder; zero biases are no test, hence the large initial scale and `built`."""
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": channel}
    fields = {
        "vocab_size": VOCAB,
        "d_model": D,
        "max_seq_len": 16,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "init": {"std": 0.3},
    }
    return validate(ModelConfig, fields | changes)


def built(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    module = model.build("cpu")
    initialise(module, 0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return module.to(dtype)


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("_wrapped_model."): p.detach() for name, p in module.named_parameters()}


CHANNELS = {
    "mlp": MLP,
    "relu2": {"type": "nested_mlp", "d_hidden": HIDDEN, "activation": "relu2"},
    "swiglu": GATED,
    "geglu": {**GATED, "gate": "gelu_tanh", "bias": True},
}


@pytest.mark.parametrize("widths", [[6, 6], [12, 12], [24, 24], [48, 48], [6, 48], [48, 12], [18, 41]], ids=str)
@pytest.mark.parametrize("name", CHANNELS)
@torch.no_grad()
def test_a_slice_is_the_cut_model(name: str, widths: list[int]) -> None:
    nested = config(CHANNELS[name])
    module = built(nested).eval()
    set_widths(module, widths)
    plain, cut = extract(nested, tensors(module), widths)
    other = build_model(plain, cut)
    assert not nested_channels(other)
    assert [block.channel.width(D) for block in plain.blocks()] == widths  # type: ignore[union-attr]
    assert torch.equal(module(tokens(), SEQ).hidden, other(tokens(), SEQ).hidden)
    assert sum(p.numel() for p in other.parameters()) == plain.cost().total.params


@pytest.mark.parametrize("name", ["mlp", "swiglu"])
@torch.no_grad()
def test_decoding_at_a_width_per_layer(name: str) -> None:
    module = built(config(CHANNELS[name]), torch.float64).eval()
    with at_widths(module, [6, 24]):
        whole = module(tokens(), SEQ).hidden
        state = module.new_state(2, 9, dtype=torch.float64, device="cpu")
        parts = [
            module(tokens()[:, a:b], SeqInfo.contiguous(2, b - a, start=a), state=state).hidden
            for a, b in ((0, 5), (5, 6), (6, 9))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert [channel.width for channel in nested_channels(module)] == [HIDDEN, HIDDEN]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("share", SHARES)
def test_masked_is_sliced(activation: Any, share: float) -> None:
    """Values and gradients. Masking after the activation makes it true for any activation, act(0) = 0 or not."""
    x = torch.randn(2, 9, D, dtype=torch.float64)
    options = {"d_hidden": HIDDEN, "bias": True}
    forms = [NestedMLPConfig(activation=activation, form=form, **options) for form in ("sliced", "masked")]
    if activation in ("silu", "gelu", "gelu_tanh"):
        forms += [NestedGatedConfig(gate=activation, form=form, **options) for form in ("sliced", "masked")]
    for sliced, masked in zip(forms[::2], forms[1::2]):
        found = []
        start = ready(sliced.build(context())).state_dict()
        for form in (sliced, masked):
            channel = form.build(context()).double()
            channel.load_state_dict(start)
            channel.set_width(units(share, HIDDEN))
            y = channel(x, SEQ)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(channel.parameters()))])
            by_seq = at_granularity(SEQ, SHARES, SHARES.index(share))
            channel.set_width(HIDDEN)
            assert torch.equal(channel(x, by_seq), y), "the description names the granularity"
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("plain", "nested"),
    [
        ({"type": "mlp", "d_hidden": HIDDEN, "bias": True}, MLP),
        ({"type": "swiglu", "d_hidden": HIDDEN}, GATED),
        ({"type": "geglu", "d_hidden": HIDDEN}, {**GATED, "gate": "gelu"}),
    ],
)
@torch.no_grad()
def test_the_whole_is_the_host(plain: Any, nested: Any) -> None:
    host, ours = built(config(plain)), built(config(nested))
    wrapped = built(config(plain, wrappers=["nested"])).eval()
    assert [n for n, _ in host.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert torch.equal(host(tokens(), SEQ).hidden, ours(tokens(), SEQ).hidden)
    assert torch.equal(host(tokens(), SEQ).hidden, wrapped(tokens(), SEQ).hidden)
    assert config(plain).cost().total.params == config(nested).cost().total.params
    assert host.init_names() == wrapped.init_names()


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("form", ["sliced", "masked"])
def test_units_beyond_the_width_have_zero_gradient(name: str, form: str) -> None:
    module = built(config({**CHANNELS[name], "form": form}))
    n = 12
    with at_widths(module, [n, n]):
        module(tokens(), SEQ).hidden.square().sum().backward()
    for channel in nested_channels(module):
        parts = [channel.up.weight.grad, channel.down.weight.grad.T]
        parts += [channel.gate.weight.grad] if channel.is_gated else []
        parts += [channel.up.bias.grad] if channel.up.bias is not None else []
        for grad in parts:
            assert not grad[n:].any()
            assert (grad[:n].reshape(n, -1).abs().amax(1) > 0).any()
        if channel.down.bias is not None:
            assert bool(channel.down.bias.grad.all()), "the last bias is used whole"


def test_submodel_shares_storage_and_nests_further() -> None:
    channel = ready(NestedGatedConfig(d_hidden=HIDDEN, bias=True).build(context()))
    x = torch.randn(2, 9, D, dtype=torch.float64)
    half = channel.submodel(0.5)
    assert half.widths == (6, 12, 24)
    channel.set_width(24)
    torch.testing.assert_close(half(x, SEQ), channel(x, SEQ))
    torch.testing.assert_close(half.submodel(0.25)(x, SEQ), channel.submodel(0.125)(x, SEQ))
    assert half.up.weight.data_ptr() == channel.up.weight.data_ptr()


def batch(dtype: torch.dtype = torch.int64) -> Microbatch:
    ids = tokens(2, 10)
    return Microbatch(tokens=ids[:, :-1], labels=ids[:, 1:], seq=SeqInfo.from_lengths([[9], [4, 5]], 9))


def gradients_of(module: Any) -> dict[str, Tensor]:
    """Gradients of the training loss, by name."""
    module.zero_grad()
    LanguageModelLoss(z_loss=1e-3)(module, batch()).sum.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def summed(**options: Any) -> dict[str, Any]:
    return {"wrappers": [{"type": "nested", "objective": "summed", **options}]}


@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 0.0, 2.0)])
@pytest.mark.parametrize("name", ["mlp", "swiglu"])
def test_the_summed_gradient_is_the_sum(name: str, weights: Any) -> None:
    module = built(config(CHANNELS[name], **summed(weights=weights)), torch.float64)
    together = gradients_of(module)
    bare = built(config(CHANNELS[name]), torch.float64)
    total: dict[str, Tensor] = {}
    for share, weight in zip(SHARES, weights or (1.0,) * 4):
        with at_widths(bare, [units(share, HIDDEN)] * 2):
            for parameter, grad in gradients_of(bare).items():
                total[parameter] = total.get(parameter, 0) + weight * grad
    for parameter, grad in total.items():
        torch.testing.assert_close(together[f"_wrapped_model.{parameter}"], grad)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activations_computed_again_are_of_the_same_width(mode: Any) -> None:
    expected = gradients_of(built(config(**summed()), torch.float64))
    module = built(config(**summed()), torch.float64)
    checkpoint_blocks(module, mode)
    for name, grad in gradients_of(module).items():
        torch.testing.assert_close(grad, expected[name])


def test_the_summed_loss_reports_the_whole_width_alone() -> None:
    module = built(config(**summed()))
    out = LanguageModelLoss()(module, batch())
    module.eval()
    alone = LanguageModelLoss()(module, batch())
    torch.testing.assert_close(out.metrics["loss"], alone.metrics["loss"])
    torch.testing.assert_close(alone.sum, alone.metrics["loss"])
    assert out.sum.item() > 3 * alone.sum.item()


def test_a_step_trains_the_drawn_width() -> None:
    module = built(config(wrappers=["nested"]))
    bare = built(config())
    seen = set()
    for step in range(12):
        before_step(module, Progress(step, 12, seed=3))
        index = draw((0.25,) * 4, 3, step)
        seen.add(index)
        with at_widths(bare, [units(SHARES[index], HIDDEN)] * 2):
            expected = gradients_of(bare)
        for name, grad in gradients_of(module).items():
            assert torch.equal(grad, expected[name.removeprefix("_wrapped_model.")])
        module.eval()
        assert torch.equal(module(tokens(), SEQ).hidden, bare(tokens(), SEQ).hidden), "evaluation runs the whole width"
        module.train()
    assert len(seen) == 4


def test_draws() -> None:
    steps = range(4000)
    uniform = Counter(draw((0.25,) * 4, 0, step) for step in steps)
    assert all(abs(uniform[index] - 1000) < 120 for index in range(4)), uniform
    skewed = Counter(draw((0.1, 0.0, 0.2, 0.7), 0, step) for step in steps)
    assert skewed[1] == 0 and abs(skewed[3] - 2800) < 120 and abs(skewed[0] - 400) < 80, skewed
    assert [draw((0.25,) * 4, 0, s) for s in range(8)] == [draw((0.25,) * 4, 0, s) for s in range(8)]
    assert [draw((0.25,) * 4, 0, s) for s in range(40)] != [draw((0.25,) * 4, 1, s) for s in range(40)]
    assert draw((0.3, 0.7 - 1e-12), 0, 1) in (0, 1)


@torch.no_grad()
def test_mix_and_match() -> None:
    """Equal entries are the uniform granularity, and the g^L mixtures are as many models."""
    module = built(config(n_layers=3)).eval()
    outputs = {}
    for widths in itertools.product([6, 12, 24, 48], repeat=3):
        with at_widths(module, widths):
            outputs[widths] = module(tokens(), SEQ).hidden
    assert len({tuple(h.flatten().tolist()) for h in outputs.values()}) == 4**3
    assert len({str(plain_config(config(n_layers=3), w).to_dict()) for w in outputs}) == 4**3
    for share in SHARES:
        n = units(share, HIDDEN)
        widths = SliceOptions(slice=share).of(config(n_layers=3))
        assert widths == [n] * 3
        whole = at_granularity(SEQ, SHARES, SHARES.index(share))
        assert torch.equal(module(tokens(), whole).hidden, outputs[(n,) * 3])


def test_extraction_keeps_the_groups_of_layers() -> None:
    block = {"mixer": {"type": "attention", "n_heads": 2}}
    layers = [{"pattern": [{**block, "channel": MLP}, {**block, "channel": "swiglu"}], "repeat": 3}]
    model = config(layers=layers)
    assert whole_widths(model) == [HIDDEN] * 3, "a layer that nobody nests is no slice"
    uniform = plain_config(model, [12] * 3)
    assert [(len(group.pattern), group.repeat) for group in uniform.layers] == [(2, 3)]
    assert uniform.blocks()[1] == model.blocks()[1]
    mixed = plain_config(config(n_layers=4), [12, 12, 24, 48])
    assert [(len(group.pattern), group.repeat) for group in mixed.layers] == [(1, 2), (1, 1), (1, 1)]
    wrapped = config("swiglu", wrappers=["nested"])
    assert plain_config(wrapped) == config({"type": "swiglu", "d_hidden": 96})


def graphs(form: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Graphs compiled, block by block, for four steps at each of four granularities."""
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    def with_backend(forward: Any, **options: Any) -> Any:
        return compile_(forward, backend=backend, fullgraph=True, **options)

    compile_ = torch.compile
    monkeypatch.setattr(compiling.torch, "compile", with_backend)
    module = built(config({**GATED, "form": form}, wrappers=["nested"], n_layers=3), torch.float64)
    expected = built(config(GATED, wrappers=["nested"], n_layers=3), torch.float64)
    torch._dynamo.reset()
    compiling.compile_blocks(module, torch.device("cpu"))
    for step in range(16):
        for one in (module, expected):
            before_step(one, Progress(step, 16, seed=5))
        found, wanted = gradients_of(module), gradients_of(expected)
        for name in found:
            torch.testing.assert_close(found[name], wanted[name])
    torch._dynamo.reset()
    assert len({draw((0.25,) * 4, 5, step) for step in range(16)}) == 4
    return count


def test_one_graph_for_each_granularity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs("sliced", monkeypatch) == 4


def test_masked_layers_need_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs("masked", monkeypatch) == 1


@pytest.mark.parametrize("objective", ["sampled", "summed"])
@pytest.mark.parametrize("form", ["sliced", "masked"])
def test_training_cost(objective: str, form: str) -> None:
    """The mean over draws, or the sum: from the costs of the models that the slices are."""
    nested = config({**GATED, "form": form}, wrappers=[{"type": "nested", "objective": objective}])
    found = nested.cost(16)
    cut = [plain_config(nested, [units(s, HIDDEN) if form == "sliced" else HIDDEN] * 2).cost(16) for s in SHARES]
    n = 4 if objective == "sampled" else 1
    assert found.total.flops_per_token == pytest.approx(sum(c.total.flops_per_token for c in cut) / n)
    assert found.total.attention_flops == pytest.approx(sum(c.total.attention_flops for c in cut) / n)
    assert found.total.params == cut[-1].total.params
    assert nested.cost(16, "decode") == config(GATED).cost(16, "decode")


PUBLISHED = {
    "matlm-78m": (78.1, 73.9, 71.8, 70.8, 12.6, 8.4, 6.3, 5.2),
    "matlm-180m": (181.4, 164.6, 156.2, 152.0, 50.3, 33.6, 25.2, 21.0),
    "matlm-310m": (309.9, 272.1, 253.2, 243.8, 113.2, 75.5, 56.6, 47.2),
    "matlm-463m": (463.5, 396.4, 362.8, 346.0, 201.3, 134.2, 100.7, 83.9),
    "matlm-850m": (846.2, 695.2, 619.7, 582.0, 453.0, 302.0, 226.5, 188.7),
    "matlm-1.3b": (1329.6, 1061.2, 926.9, 859.8, 805.3, 536.9, 402.7, 335.5),
    "matlm-2.6b": (2598.4, 1994.4, 1692.4, 1541.4, 1811.9, 1208.0, 906.0, 755.0),
}
"""Millions of parameters of XL, L, M and S, then the same without the embedding."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_matlm_slices(name: str) -> None:
    """All 28 sizes as published, exactly as the formula says, and the feed-forward part exactly by 1/k."""
    model = ModelConfig.model_validate({"variant": name})
    d = model.d_model
    for index, divisor in enumerate((1, 2, 4, 8)):
        plain = plain_config(model, SliceOptions(slice=1 / divisor).of(model))
        module = plain.build("meta")
        matrices = {n: p.numel() for n, p in module.named_parameters() if p.dim() == 2}
        blocks = sum(n for part, n in matrices.items() if part.startswith("layers."))
        total, inside = PUBLISHED[name][index], PUBLISHED[name][index + 4]
        assert sum(matrices.values()) == 256000 * d + 16 * (4 * d**2 + 8 * d**2 // divisor)
        assert sum(n for part, n in matrices.items() if ".channel." in part) * divisor == 16 * 8 * d**2
        assert sum(matrices.values()) / 1e6 == pytest.approx(total, abs=0.051)
        assert blocks / 1e6 == pytest.approx(inside, abs=0.051)
        assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(total, rel=0.01)


class _Other(DenseLinear):
    """A linear layer that is not a plain matrix."""


def test_linears_that_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.blocks.base import LINEARS
    from llm.blocks.linears.dense import DenseLinearConfig

    class OtherConfig(DenseLinearConfig):
        type_name = ""

        def build(self, d_in: int, d_out: int, **options: Any) -> Any:
            return _Other(d_in, d_out, **options)

    del OtherConfig.type_name
    LINEARS.register("other_test", tiny=OtherConfig, paper="test only")(OtherConfig)
    try:
        linear = {"channel.down": {"type": "other_test"}}
        with pytest.raises(
            UserError, match="form=sliced cuts the weights of dense linears, but at channel.down stands"
        ):
            config({**MLP, "form": "sliced"}, linear=linear).build("meta")
        other = built(config(linear=linear))
        same = built(config())
        with torch.no_grad(), at_widths(other, [12, 24]), at_widths(same, [12, 24]):
            torch.testing.assert_close(other(tokens(), SEQ).hidden, same(tokens(), SEQ).hidden)
        with pytest.raises(UserError, match="layer 0 has no dense linears at channel"):
            extract(config(linear=linear), tensors(other), [12, 24])
        with pytest.raises(UserError, match="only a nested layer of dense linears has a sub-model"):
            nested_channels(other)[0].submodel(0.5)
    finally:
        LINEARS.unregister("other_test")


MISTAKES: list[tuple[Any, str]] = [
    (lambda: config({**MLP, "granularities": [0.5, 0.25, 1]}).build(), "granularities must rise and end with 1"),
    (lambda: config({**MLP, "granularities": [0.25, 0.5]}).build(), "granularities must rise and end with 1"),
    (lambda: config({**MLP, "granularities": ["1/5", 1]}).build(), "0.2 of 48 hidden units is 9.6"),
    (lambda: config({**MLP, "granularities": ["x", 1]}).build(), "expected a fraction"),
    (lambda: config("moe_none", wrappers=["nested"]), "unknown channel"),
    (
        lambda: config({"type": "moe", "n_experts": 2, "d_hidden": 8}, wrappers=["nested"]).build(),
        "no layer of the model can be nested",
    ),
    (lambda: NestedTrainingConfig(weights=(1, 1, 1, 1)), "weights has no effect with objective: sampled"),
    (
        lambda: NestedTrainingConfig(objective="summed", probabilities=(1,)),
        "probabilities has no effect with objective: summed",
    ),
    (lambda: NestedTrainingConfig(probabilities=(0.5, 0.6)), "probabilities must sum to 1"),
    (
        lambda: config(wrappers=[{"type": "nested", "probabilities": [0.5, 0.5]}]).build(),
        "2 probabilities for 4 granularities",
    ),
    (
        lambda: config(wrappers=[{"type": "nested", "granularities": [0.5, 1]}]).build(),
        "the layers and the wrapper have different granularities",
    ),
    (lambda: config(wrappers=["nested", "nested"]).build(), "nested reaches into the layers of a bare decoder"),
    (
        lambda: config(wrappers=[{"type": "nested", "objective": "summed"}, "nested"]).build(),
        "summed scores several outputs",
    ),
    (lambda: SliceOptions(slice=0.5, widths=3), "give one of slice and widths"),
    (lambda: SliceOptions(slice=0.5).of(config("swiglu")), "slice is for nested models"),
    (lambda: SliceOptions(slice=[0.5]).of(config()), "slice has 1 entries, the model 2 nested layers"),
    (lambda: SliceOptions(slice="1/5").of(config()), "0.2 of 48 hidden units is 9.6"),
    (lambda: SliceOptions(widths=[1, 49]).of(config()), "nested layer 1 has 48 hidden units; given a width of 49"),
    (lambda: plain_config(config("swiglu")), "only a nested model has slices"),
    (lambda: set_widths(built(config()), [1]), "1 widths for 2 nested layers"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
