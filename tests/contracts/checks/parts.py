"""Contracts of linears, norms, position encodings and residual styles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from llm.blocks.base import (
    CHANNELS,
    MIXERS,
    InitConfig,
    LinearConfig,
    NormConfig,
    PositionConfig,
    PositionEncoding,
    ResidualConfig,
)
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from tests.contracts.checks.exemptions import Check
from tests.contracts.checks.harness import (
    D_MODEL,
    MAX_SEQ_LEN,
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
)

_INIT = InitConfig(std=None, scale_residual=False)


def _linear(config: LinearConfig, d_in: int = 24, d_out: int = 40, *, bias: bool = True, std: float = 0.2) -> nn.Module:
    return config.build(d_in, d_out, bias=bias, std=std, init=_INIT)


def check_linear_shape(config: LinearConfig) -> None:
    """[..., d_in] -> [..., d_out] for any leading dimensions, each token for itself."""
    for d_in, d_out, bias in ((24, 40, True), (32, 32, False), (64, 8, False)):
        module = fill(_linear(config, d_in, d_out, bias=bias))
        x = random(2, 5, d_in)
        with torch.no_grad():
            y = module(x)
            assert y.shape == (2, 5, d_out), f"{tuple(x.shape)} became {tuple(y.shape)}, expected (2, 5, {d_out})"
            assert_same(module(x[1, 3]), y[1, 3], "one token alone")
            assert module(x[:0]).shape == (0, 5, d_out), "an empty batch changes the shape"


def check_linear_init_std(config: LinearConfig) -> None:
    """Standard normal inputs come out with standard deviation std * sqrt(d_in), within 15%."""
    from llm.core.init import initialise

    for std in (0.02, 0.1):
        module = _linear(config, 256, 256, bias=False, std=std)
        initialise(module, 0)
        with torch.no_grad():
            measured = float(module(random(256, 256, dtype=torch.float32)).std())
        asked = std * 16
        assert abs(measured / asked - 1) < 0.15, f"outputs have std {measured:.3g}, asked for {asked:.3g}"


def check_linear_role_override(config: LinearConfig) -> None:
    """`model.linear: {role glob: this}` written in YAML reaches the roles it names, and only those."""
    mixer, channel = MIXERS.entry("attention").tiny(), CHANNELS.entry("swiglu").tiny()
    plain = tiny_model(mixer, channel)
    text = yaml.safe_dump({**plain.to_dict(), "linear": {"mixer.q": config.to_dict(), "channel.*": config.to_dict()}})
    model = ModelConfig.model_validate(yaml.safe_load(text))
    wanted = plain.linear | {"mixer.q": config, "channel.*": config}
    assert dict(model.linear) == wanted, f"YAML gives {model.linear}"
    ctx = model.context(0)
    for role, own in (("mixer.q", True), ("mixer.k", False), ("channel.up", True)):
        made = type(ctx.linear(32, 32, role=role))
        expected = type(_linear(config)) if own else type(plain.context(0).linear(32, 32, role=role))
        assert made is expected, f"role {role} is served by {made.__name__}, expected {expected.__name__}"
    total = model.cost(32).total.params
    assert n_parameters(model.build("meta")) == total, "the decoder's parameters differ from its cost"


def check_linear_cost(config: LinearConfig) -> None:
    """Parameters as counted; FLOPs between 0.9 times the contractions and 1.1 times those with element-wise work."""
    for d_in, d_out, bias in ((24, 40, True), (64, 16, False)):
        module = fill(_linear(config, d_in, d_out, bias=bias), dtype=torch.float32)
        cost = config.cost(d_in, d_out, bias=bias)
        assert cost.params == n_parameters(module), f"cost() says {cost.params}, the module has {n_parameters(module)}"
        assert 0 < cost.active_params <= cost.params
        x = random(32, d_in, dtype=torch.float32)
        contractions, elementwise = count_flops(lambda m=module, x=x: m(x))
        low, high = 0.9 * contractions, 1.1 * (contractions + elementwise)
        stated = 32 * cost.flops_per_token
        assert low <= stated <= high, f"FLOPs: cost() says {stated:.0f}, counted {low:.0f} to {high:.0f}"


def check_linear_gradients(config: LinearConfig) -> None:
    """Analytic gradients agree with finite differences in float64."""
    gradcheck(fill(_linear(config)), lambda module, x: module(x), random(3, 24))


def check_linear_bf16(config: LinearConfig) -> None:
    """bf16 stays near float32."""
    _check_bf16(lambda dtype: fill(_linear(config), dtype=dtype), random(2, 32, 24, dtype=torch.float32))


def check_linear_compile(config: LinearConfig) -> None:
    """No graph break."""
    _check_compile(fill(_linear(config), dtype=torch.float32), random(2, 8, 24, dtype=torch.float32))


def check_linear_init(config: LinearConfig) -> None:
    """Init by name covers everything, whatever the layout."""
    check_init(lambda: _linear(config))


def check_norm_values(config: NormConfig) -> None:
    """Shape kept, each token for itself, finite for zeros and for large values, and insensitive to scale."""
    module = fill(config.build(D_MODEL))
    x = random(2, 7, D_MODEL)
    with torch.no_grad():
        y = module(x)
        assert y.shape == x.shape
        assert_same(module(x[:, 3:4]), y[:, 3:4], "one token alone")
        assert_same(module(50 * x), y, "an input 50 times larger", 1e-3)
        for extreme in (torch.zeros_like(x), 1e4 * x):
            low = fill(config.build(D_MODEL), dtype=torch.bfloat16)(extreme.bfloat16())
            assert bool(torch.isfinite(low).all()), "not finite for zeros or large values in bf16"


def check_norm_cost(config: NormConfig) -> None:
    """Parameters as counted."""
    counted = n_parameters(config.build(48))
    assert config.cost(48).params == counted, f"cost() says {config.cost(48).params}, the module has {counted}"


def check_norm_gradients(config: NormConfig) -> None:
    """Analytic gradients agree with finite differences in float64."""
    gradcheck(fill(config.build(D_MODEL)), lambda module, x: module(x), random(3, D_MODEL))


def check_norm_bf16(config: NormConfig) -> None:
    """bf16 stays near float32."""
    _check_bf16(lambda dtype: fill(config.build(D_MODEL), dtype=dtype), random(2, 32, D_MODEL, dtype=torch.float32))


def check_norm_compile(config: NormConfig) -> None:
    """No graph break."""
    _check_compile(fill(config.build(D_MODEL), dtype=torch.float32), random(2, 8, D_MODEL, dtype=torch.float32))


def check_norm_init(config: NormConfig) -> None:
    """Init by name covers everything, whatever the layout."""
    check_init(lambda: config.build(D_MODEL))


def _position(config: PositionConfig, dtype: torch.dtype = torch.float64, d_head: int = 8) -> PositionEncoding:
    module = fill(config.build(context(position=config)), dtype=dtype)
    module.for_heads(d_head)
    return module


def _hooks(config: PositionConfig, seq: SeqInfo, part: slice, seed: int = 0) -> list[Tensor]:
    """Outputs of the hooks for tokens `part` of a fixed batch, described by `seq`."""
    module = _position(config)
    own = SeqInfo(seq.positions, seq.cu_seqlens, seq.max_seqlen)
    module.prepare(own, torch.float64)
    q, k = random(2, 12, 4, 8, seed=seed), random(2, 12, 2, 8, seed=seed + 1)
    x = random(2, 12, D_MODEL, seed=seed + 2)
    with torch.no_grad():
        turned = module.at_qk(q[:, part], k[:, part], own)
        return [*turned, module.at_embed(x[:, part], own)]


def check_position_shapes(config: PositionConfig) -> None:
    """Every hook keeps shapes and dtypes; a bias has one slope in (0, 1] per head."""
    module = _position(config, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        seq = SeqInfo.contiguous(2, 12)
        module.prepare(seq, dtype)
        q, k, x = (
            random(2, 12, 4, 8, dtype=dtype),
            random(2, 12, 2, 8, dtype=dtype),
            random(2, 12, D_MODEL, dtype=dtype),
        )
        for given, out in zip((q, k, x), (*module.at_qk(q, k, seq), module.at_embed(x, seq))):
            assert out.shape == given.shape, f"{tuple(given.shape)} became {tuple(out.shape)}"
            assert out.dtype == given.dtype, f"{given.dtype} became {out.dtype}"
    for n_heads in (1, 4, 12):
        slopes = module.slopes(n_heads)
        if slopes is not None:
            assert len(slopes) == n_heads and all(0 < slope <= 1 for slope in slopes), f"slopes {slopes}"


def check_position_offsets(config: PositionConfig) -> None:
    """A token's encoding depends on its position alone: not on the split into calls, nor on what stands before it."""
    whole = _hooks(config, SeqInfo.contiguous(2, 12), slice(None))
    late = _hooks(config, SeqInfo.contiguous(2, 5, start=7), slice(7, None))
    for part, full in zip(late, whole):
        assert_same(part, full[:, 7:], "tokens 7 to 11 in a call of their own")
    packed = _hooks(config, SeqInfo.from_lengths([[7, 5], [7, 5]], 12), slice(None))
    alone = _hooks(config, SeqInfo.contiguous(2, 5), slice(7, None))
    for part, single in zip(packed, alone):
        assert_same(part[:, 7:], single, "a second packed document")
    far = _hooks(config, SeqInfo.contiguous(2, 1, start=MAX_SEQ_LEN - 1), slice(0, 1))
    assert all(bool(torch.isfinite(part).all()) for part in far), "not finite at the last position"


def check_position_relative(config: PositionConfig) -> None:
    """Where queries and keys are turned, their products depend on the distance alone."""
    shifts = []
    for start in (0, 9):
        module = _position(config)
        seq = SeqInfo.contiguous(1, 6, start=start)
        module.prepare(seq, torch.float64)
        q, k = module.at_qk(random(1, 6, 1, 8), random(1, 6, 1, 8, seed=1), seq)
        shifts.append(q[0, :, 0] @ k[0, :, 0].T)
    # Angles are computed in float32: that is what the tolerance allows for.
    assert_same(shifts[1], shifts[0], "products of queries and keys nine positions later", 1e-5)


def check_position_cost(config: PositionConfig) -> None:
    """Parameters as counted."""
    counted = n_parameters(config.build(context(position=config)))
    stated = config.cost(D_MODEL, MAX_SEQ_LEN).params
    assert stated == counted, f"cost() says {stated} parameters, the module has {counted}"


def check_position_init(config: PositionConfig) -> None:
    """Init by name covers everything, whatever the layout."""
    check_init(lambda: config.build(context(position=config)))


_PARTS = ((True, True), (True, False), (False, True))


def _residual(config: ResidualConfig, mixer: bool, channel: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    return fill(config.build(context(), mixer=mixer, channel=channel), dtype=dtype)


def check_residual_calls(config: ResidualConfig) -> None:
    """Each part is called once with [B, T, D]; the outcome depends on x and on every part; each token for itself."""
    for mixer, channel in _PARTS:
        _check_residual_calls(config, mixer, channel)


def _check_residual_calls(config: ResidualConfig, mixer: bool, channel: bool) -> None:
    module = _residual(config, mixer, channel)
    calls: list[str] = []

    def part(name: str, factor: float) -> Callable[[Tensor], Tensor]:
        def call(y: Tensor) -> Tensor:
            assert y.shape[-1] == D_MODEL and y.dim() == 3, f"the {name} is given {tuple(y.shape)}"
            calls.append(name)
            return torch.tanh(factor * y.flip(-1)) + 0.1 * y

        return call

    def outcome(x: Tensor, a: float = 1.0, b: float = 1.0) -> Tensor:
        calls.clear()
        with torch.no_grad():
            y = module(x, part("mixer", a) if mixer else None, part("channel", b) if channel else None)
        assert sorted(calls) == ["channel"] * channel + ["mixer"] * mixer, f"called: {calls}"
        return y

    x = random(2, 5, D_MODEL)
    y = outcome(x)
    assert y.shape == x.shape
    assert_same(outcome(x[:, 2:3]), y[:, 2:3], "one token alone")
    assert gap(outcome(2 * x + 1), y) > 1e-6, "x does not matter"
    assert not mixer or gap(outcome(x, a=2.0), y) > 1e-6, "the mixer does not matter"
    assert not channel or gap(outcome(x, b=2.0), y) > 1e-6, "the channel mixer does not matter"


def check_residual_cost(config: ResidualConfig) -> None:
    """Parameters as counted, for either part absent."""
    for mixer, channel in _PARTS:
        counted = n_parameters(config.build(context(), mixer=mixer, channel=channel))
        stated = config.cost(context().dims(), mixer=mixer, channel=channel).params
        assert stated == counted, f"mixer {mixer}, channel {channel}: cost() says {stated}, the module has {counted}"


def check_residual_gradients(config: ResidualConfig) -> None:
    """Analytic gradients agree with finite differences in float64."""
    for mixer, channel in _PARTS:
        module = _residual(config, mixer, channel)
        parts = (torch.tanh if mixer else None, torch.sin if channel else None)
        gradcheck(module, lambda m, x, parts=parts: m(x, *parts), random(1, 3, D_MODEL))


def check_residual_compile(config: ResidualConfig) -> None:
    """No graph break."""
    x = random(2, 5, D_MODEL, dtype=torch.float32)
    module = _residual(config, True, True, torch.float32)
    expected = module(x, torch.tanh, torch.sin)
    (output,), _ = compiled_calls(module, [(x, torch.tanh, torch.sin)])
    assert_same(output, expected, "compiled output", 1e-5)


def check_residual_init(config: ResidualConfig) -> None:
    """Init by name covers everything, whatever the layout."""
    for mixer, channel in _PARTS:
        check_init(lambda m=mixer, c=channel: config.build(context(), mixer=m, channel=c))


def _check_bf16(build: Any, x: Tensor) -> None:
    with torch.no_grad():
        exact = build(torch.float32)(x)
        low = build(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16, f"bf16 in, {low.dtype} out"
    assert_near(low, exact, "bf16 against float32")


def _check_compile(module: nn.Module, x: Tensor) -> None:
    expected = module(x)
    (output,), _ = compiled_calls(module, [(x,)])
    assert_same(output, expected, "compiled output", 1e-5)


LINEAR_CHECKS: dict[str, Check] = {
    "shape": check_linear_shape,
    "init_std": check_linear_init_std,
    "role_override": check_linear_role_override,
    "cost": check_linear_cost,
    "gradients": check_linear_gradients,
    "bf16": check_linear_bf16,
    "compile": check_linear_compile,
    "init": check_linear_init,
}
NORM_CHECKS: dict[str, Check] = {
    "values": check_norm_values,
    "cost": check_norm_cost,
    "gradients": check_norm_gradients,
    "bf16": check_norm_bf16,
    "compile": check_norm_compile,
    "init": check_norm_init,
}
POSITION_CHECKS: dict[str, Check] = {
    "shapes": check_position_shapes,
    "offsets": check_position_offsets,
    "relative": check_position_relative,
    "cost": check_position_cost,
    "init": check_position_init,
}
RESIDUAL_CHECKS: dict[str, Check] = {
    "calls": check_residual_calls,
    "cost": check_residual_cost,
    "gradients": check_residual_gradients,
    "compile": check_residual_compile,
    "init": check_residual_init,
}
