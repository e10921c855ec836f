"""Matrices in eight bits: slices, compiled steps, pages, saved states, the CPU's product, fp8, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.blocks.base import CHANNELS, MIXERS
from llm.blocks.linears.dense import let_join, quantized_linear
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.generate.decode_step import CompiledStep
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import SelfDrafter
from llm.generate.engine import Engine
from llm.generate.load import load_model
from llm.generate.prefix import Prefix
from llm.generate.quantize import _check_device, quantize_model
from llm.generate.sampling import Sampling
from llm.models.nesting import at_widths, nested_channels
from tests.contracts.checks.harness import assert_same, fill, tiny_model
from tests.contracts.test_speculative import PROMPTS
from tests.unit.generate.runs import MODEL, write_run

pytest.importorskip("torchao")

Cli = Callable[..., Any]
GREEDY = Sampling(temperature=0, max_new_tokens=12)
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])


def tiny(channel: str, label: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    make = CHANNELS.entry(channel).variants()[label or channel]
    config = tiny_model(MIXERS.entry("attention").tiny(), make(), max_seq_len=300)
    return fill(config.build("cpu"), dtype=dtype).eval()


def written_out(model: Any, exact: Any) -> Any:
    """An ordinary model of the values that the quantised one's weights stand for."""
    found = copy.deepcopy(exact)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            stored: Any = model.get_parameter(name)
            parameter.copy_(stored.dequantize() if hasattr(stored, "qdata") else stored)
    return found


def tokens(model: Any, **settings: Any) -> list[list[int]]:
    engine = Engine(model, **settings)
    return [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.head(model(TOKENS, SeqInfo.contiguous(1, TOKENS.shape[1])).hidden)


@pytest.mark.parametrize("how", ["int8", "fp8"])
@pytest.mark.parametrize("label", ["nested_gated", "nested_gated-geglu", "nested_mlp", "nested_mlp-masked"])
def test_slices_of_a_nested_model(label: str, how: Any) -> None:
    exact = tiny(label.split("-")[0], label)
    model = copy.deepcopy(exact)
    quantize_model(model, how)
    plain = written_out(model, exact)
    whole = logits(model)
    for width in (1, 6, 11):
        for channel in [*nested_channels(model), *nested_channels(plain)]:
            channel.set_width(width)
        assert_same(logits(model), logits(plain), f"width {width}", 1e-5)
        assert not torch.allclose(logits(model), whole, rtol=1e-3)


def test_a_quantized_slice_drafts() -> None:
    model = tiny("nested_gated")
    quantize_model(model, "int8")
    drafter = SelfDrafter(model, lambda: at_widths(model, [6, 6]), "slice:1/4")
    assert tokens(model, drafter=drafter, draft_length=DraftLength(3)) == tokens(model)


@pytest.mark.parametrize(("channel", "how"), [("swiglu", "fp8"), ("moe", "int8")])
def test_the_compiled_step_says_the_same(channel: str, how: Any) -> None:
    torch.compiler.reset()
    model = tiny(channel)
    quantize_model(model, how)
    engine = Engine(model)
    engine.step = CompiledStep(model, backend="eager")
    assert [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)] == tokens(model)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_code_for_this_machine(how: Any) -> None:
    torch.compiler.reset()
    model = tiny("swiglu")
    quantize_model(model, how)
    assert tokens(model, compile=True) == tokens(model)


def test_pages_say_the_same() -> None:
    model = tiny("swiglu")
    quantize_model(model, "int8")
    assert tokens(model, cache="paged", page_size=4, prefix_cache=10**6) == tokens(model)


def test_a_saved_state_belongs_to_the_quantized_model(tmp_path: Path) -> None:
    exact = tiny("swiglu")
    model = copy.deepcopy(exact)
    quantize_model(model, "int8")
    text = PROMPTS[1]
    Prefix.read(model, text, capacity=60).save(tmp_path / "state.safetensors")
    prefix = Prefix.load(tmp_path / "state.safetensors")
    greedy = Sampling(temperature=0, max_new_tokens=5)
    saved = Engine(model, context=60, prefix=prefix).generate([[*text, 3]], greedy)
    assert saved == Engine(model, context=60).generate([[*text, 3]], greedy)
    with pytest.raises(UserError):
        Engine(exact, context=60, prefix=prefix)


@torch.no_grad()
def test_the_order_of_quantizing_and_joining_does_not_matter() -> None:
    first, second = tiny("swiglu"), tiny("swiglu")
    quantize_model(first, "int8")
    let_join(first)
    let_join(second)
    tokens(second)
    quantize_model(second, "int8")
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("n_rows", [1, 3, 8, 9])
@pytest.mark.parametrize(("d_out", "d_in"), [(7, 5), (33, 64), (64, 130), (36, 96)])
@pytest.mark.parametrize("offset", [0, 1])
@torch.no_grad()
def test_products_in_bf16(n_rows: int, d_out: int, d_in: int, offset: int) -> None:
    from torchao.quantization import Int8Tensor, PerRow

    rng = torch.Generator().manual_seed(0)
    weight = Int8Tensor.from_hp(torch.randn(d_out, d_in, generator=rng).bfloat16(), granularity=PerRow())
    x = torch.randn(n_rows * d_in + offset, generator=rng).bfloat16()[offset:].view(n_rows, 1, d_in)
    bias = torch.randn(d_out, generator=rng).bfloat16()
    wanted = x.double() @ (weight.qdata.double() * weight.scale.double()).t() + bias.double()
    found = quantized_linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert_same(found, wanted, "product", 0.02)


@torch.no_grad()
def test_autocast_gives_bf16() -> None:
    model = tiny("swiglu")
    exact = logits(model)
    quantize_model(model, "int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = model.layers[0].channel.down
        assert linear(torch.randn(2, 24)).dtype == linear(torch.randn(20, 24)).dtype == torch.bfloat16
        assert_same(logits(model).float(), exact, "logits", 0.1)


def test_fp8_is_the_nearest_float8() -> None:
    exact = tiny("swiglu")
    model = copy.deepcopy(exact)
    found = quantize_model(model, "fp8")
    for name in found.names:
        weight, stored = exact.get_parameter(name).detach().double(), model.get_parameter(name)
        scale = weight.abs().amax(-1, keepdim=True) / 448
        q = (weight / scale).abs()
        step = 2.0 ** (q.log2().floor().clamp(min=-6) - 3)  # three bits of mantissa; below 2^-6 steps are equal
        error = (stored.dequantize().double() - weight).abs() / scale
        assert stored.qdata.dtype == torch.float8_e4m3fn and bool((error <= step / 2 * 1.001).all())
    assert tokens(model) == tokens(written_out(model, exact))


def test_wide_layers_are_quantized_on_their_way_back_too() -> None:
    config = tiny_model(MIXERS.entry("attention").tiny(), CHANNELS.entry("mlp").tiny().replace(d_hidden=512))
    found = quantize_model(fill(config.build("cpu"), dtype=torch.float32).eval(), "int8")
    assert {"layers.0.channel.up.weight", "layers.1.channel.down.weight"} <= set(found.names)
    assert found.left == ["embed.weight"]


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for how, message in (("int4", "quantize is 'int4'; allowed: none, int8, fp8"), ("", "allowed: none, int8, fp8")):
        with pytest.raises(UserError, match=message):
            quantize_model(tiny("swiglu"), how)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    _check_device("int8", torch.device("cuda"))
    with pytest.raises(UserError, match=r"quantize=fp8 needs a GPU .* this one has 8\.0; take quantize=int8"):
        _check_device("fp8", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"quantize needs torchao .* pip install 'manyformer\[quantize\]'"):
        quantize_model(tiny("swiglu"), "int8")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_commands(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p")
    done = cli("generate", run_folder, "--prompt", "ab", "temperature=0", "max_new_tokens=3", "quantize=int8")
    assert done.code == 0 and "quantize=int8: 14 matrices in 8 bits" in done.err and "as before: embed" in done.err
    scores = {}
    for how in ("none", "int8", "fp8"):
        found = cli("evaluate", run_folder, text, f"quantize={how}")
        scores[how] = json.loads(found.out)
        assert scores[how]["quantize"] == how
    assert {"evaluate-text.json", "evaluate-text-int8.json"} <= {file.name for file in run_folder.glob("*.json")}
    n_params = scores["none"]["params"]
    assert scores["none"]["parameter_bytes"] == 4 * n_params > 2 * scores["int8"]["parameter_bytes"]
    assert (
        0
        < abs(scores["int8"]["loss"] / scores["none"]["loss"] - 1)
        < abs(scores["fp8"]["loss"] / scores["none"]["loss"] - 1)
        < 0.1
    )
    refused = cli("generate", run_folder, "--prompt", "ab", "quantize=int4")
    assert refused.code == 2 and "quantize: must be 'none', 'int8' or 'fp8'" in refused.err


def test_a_custom_linear_is_left_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODEL | {"linear": {"channel.up": {"type": "pattention", "n_tokens": 24}}}
    run = write_run(tmp_path / "mixed", model=model)
    load_model(run, quantize="int8")
    told = capsys.readouterr().err
    assert "12 matrices" in told and "layers.*.channel.up.keys" in told
    everywhere = write_run(tmp_path / "all", model=MODEL | {"linear": {"*": {"type": "pattention", "n_tokens": 24}}})
    with pytest.raises(UserError, match="no dense matrices that could be quantised; leave quantize out"):
        load_model(everywhere, quantize="int8")
