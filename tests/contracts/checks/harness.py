"""What the contracts share: building a part alone or in a small decoder, comparing, and counting FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm.blocks.base import CHANNELS, BuildCtx, Caps, InitConfig, MixerConfig, TokenMixer
from llm.core.init import init_specs, name_seed
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig

D_MODEL = 32
MAX_SEQ_LEN = 64
VOCAB = 16
EXACT = 1e-8
"""Tolerance in float64, relative to the largest value: rounding is far below it, and any leak far above."""


def tiny_model(mixer: Any = None, channel: Any = None, *, n_layers: int = 2, **changes: Any) -> ModelConfig:
    """A decoder of d_model 32 whose layers have the given parts, whole-width initial scale."""
    if mixer is None and channel is None:
        channel = CHANNELS.entry("swiglu").tiny()
    block: dict[str, Any] = {"mixer": mixer, "channel": channel}
    if "residual" in changes:
        block["residual"] = changes.pop("residual")
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": D_MODEL,
        "max_seq_len": MAX_SEQ_LEN,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "init": InitConfig(std=None, scale_residual=False),
    }
    return ModelConfig.model_validate(fields | changes)


def context(**changes: Any) -> BuildCtx:
    """What a part of such a decoder may know."""
    return tiny_model(**changes).context(0)


def fill(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Start values by name, as in training; constant parameters get some noise, since a bias of zero hides errors."""
    with torch.no_grad():
        for name, tensor, init in init_specs(module):
            rng = torch.Generator().manual_seed(name_seed(seed, name))
            tensor.copy_(init(tuple(tensor.shape), rng))
            if isinstance(tensor, nn.Parameter) and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn(tensor.shape, generator=rng), alpha=0.1)
    return module.to(dtype)


def build_mixer(config: MixerConfig, dtype: torch.dtype = torch.float64) -> TokenMixer:
    """The module, filled."""
    return fill(config.build(context()), dtype=dtype)


def run(mixer: nn.Module, x: Tensor, seq: SeqInfo) -> Tensor:
    """forward with a description of its own, prepared as the decoder does it."""
    own = SeqInfo(seq.positions, seq.cu_seqlens, seq.max_seqlen, seq.valid)
    if isinstance(mixer, TokenMixer):
        mixer.prepare(own, x.dtype)
    return mixer(x, own)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b where that exceeds 1; infinite where a is not finite."""
    assert a.shape == b.shape, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}"
    if a.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def assert_same(a: Tensor, b: Tensor, what: str, tolerance: float = EXACT) -> None:
    """AssertionError that says `what` and by how much."""
    difference = gap(a, b)
    assert difference <= tolerance, f"{what}: differs by {difference:.3g}, allowed {tolerance:.3g}"


def assert_near(low: Tensor, exact: Tensor, what: str, *, tolerance: float = 0.05, share: float = 0.9) -> None:
    """At least `share` of the tokens lie within a relative distance (2-norm over channels) of the exact ones.

    A few may be off: a low-precision router may send a token to another expert.
    """
    assert bool(torch.isfinite(low).all()), f"{what}: not finite"
    low, exact = low.double().flatten(0, -2), exact.double().flatten(0, -2)
    scale = exact.norm(dim=-1).clamp(min=0.1 * float(exact.norm(dim=-1).mean()) + 1e-12)
    error = (low - exact).norm(dim=-1) / scale
    worst = float(error.quantile(share))
    assert worst <= tolerance, f"{what}: {share:.0%} of the tokens lie within {worst:.3g}, allowed {tolerance:.3g}"


def gradients(loss: Tensor, x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Gradients of a loss by name ("input" for x), zeros where there is none."""
    named = {"input": x} | {f"parameter {name}": p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)}


def gradcheck(module: nn.Module, call: Callable[..., Tensor], x: Tensor) -> None:
    """Analytic gradients against finite differences, for x and every parameter, in random directions."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in module.parameters() if p.requires_grad]

    def outputs(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters))
        return torch.func.functional_call(_Calling(module, call), {f"module.{n}": p for n, p in named.items()}, (x,))

    inputs = (x.detach().clone().requires_grad_(), *values)
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True, atol=1e-5, rtol=1e-4)


class _Calling(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def n_parameters(module: nn.Module) -> int:
    """Trainable parameters, each storage once."""
    return sum(p.numel() for p in module.parameters())


def _size(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(torch.Size(out_shape).numel()) if out_shape is not None else 0


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, n_queries, width = query
    return 2 * batch * heads * n_queries * key[2] * (width + value[3])


def _grouped(rows: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(torch.Size(rows).numel()) * weights[-1]


_aten = torch.ops.aten
_ELEMENTWISE = [
    _aten.mul,
    _aten.add,
    _aten.sub,
    _aten.div,
    _aten.addcmul,
    _aten.cumsum,
    _aten.mul_,
    _aten.add_,
    _aten.sum,
]
_ELEMENTWISE_NAMES = {str(op) for op in _ELEMENTWISE}


def count_flops(call: Callable[[], Any]) -> tuple[float, float]:
    """(FLOPs of contractions as torch's counter sees them, element-wise multiplications and additions) of one call.

    The counter sees matrix products (grouped ones too), convolutions and scaled dot-product attention (the full square,
    also where half of it is masked). It does not see element-wise work, of which additions and multiplications are
    counted here.
    """
    mapping: dict[Any, Any] = dict.fromkeys(_ELEMENTWISE, _size)
    mapping[_aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    mapping[_aten._grouped_mm] = _grouped
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), counter:
        call()
    counts = {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    elementwise = sum(n for op, n in counts.items() if op in _ELEMENTWISE_NAMES)
    return float(sum(counts.values()) - elementwise), float(elementwise)


def check_init(build: Callable[[], nn.Module]) -> None:
    """Every parameter and buffer is covered and finite, and its values depend on (seed, name) only."""
    from llm.core.init import initialise

    module = build()
    for owner_name, owner in module.named_modules():
        for name, value in vars(owner).items():
            assert not isinstance(value, Tensor), f"{owner_name}.{name} is a tensor outside parameters and buffers"
    initialise(module, 0)
    with torch.device("meta"):
        other = build()
    other = other.to_empty(device="cpu")
    for owner in other.modules():
        if hasattr(owner, "tie"):
            owner.tie()  # type: ignore[operator]
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    torch.manual_seed(1)
    initialise(other, 0)
    first, second = _tensors(module), _tensors(other)
    assert list(first) == list(second), "built on meta, the part has other parameters"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} starts differently when built on meta"
    initialise(other, 1)
    random = {name for name, p in other.named_parameters() if p.numel() > 8 and float(p.detach().std()) > 0}
    fixed = [name for name in sorted(random) if torch.equal(first[name], _tensors(other)[name])]
    assert not fixed, f"{fixed} do not depend on the seed"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()} | {
        f"buffer {name}": b.clone() for name, b in module.named_buffers()
    }


def compiled_calls(module: nn.Module, inputs: list[tuple[Any, ...]]) -> tuple[list[Tensor], int]:
    """Outputs of the compiled module (no graph break allowed) for several inputs, and how many graphs that took."""
    graphs = 0

    def backend(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    try:
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        return [compiled(*arguments) for arguments in inputs], graphs
    finally:
        torch._dynamo.reset()


def train(model: nn.Module, steps: int, lr: float = 1e-2, clip: float = math.inf) -> tuple[float, float]:
    """Loss before and after AdamW steps on one batch whose next token depends on more than the last one. clip: most
    that the gradient's norm may be."""
    tokens = torch.randint(0, 6, (2, 25), generator=torch.Generator().manual_seed(3))
    packs = all(getattr(module, "caps", Caps()).packing for module in model.modules())
    seq = SeqInfo.from_lengths([[24], [9, 15]], 24) if packs else SeqInfo.contiguous(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps + 1):
        hidden = model(tokens[:, :-1], SeqInfo(seq.positions, seq.cu_seqlens, seq.max_seqlen)).hidden
        loss = nn.functional.cross_entropy(model.head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        if clip < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]
