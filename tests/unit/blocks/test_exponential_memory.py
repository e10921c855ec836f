"""The mixer exponential_memory: dual forms against token recurrences and the truncated feature map, what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.test_time_memory import Form, Gates, Outer, Tokens, run_reference
from kernels.test_time_memory.sequence import each_tensor
from llm.blocks.mixers.exponential_memory import PRESETS, ExponentialCore, ExponentialMemoryConfig, Preset
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

D, HEADS, T, SCALE = 2, 2, 12, 1.7


def config(**keys: Any) -> ExponentialMemoryConfig:
    return ExponentialMemoryConfig.model_validate({"n_heads": HEADS, "d_head": D, "scale": SCALE} | keys)


def core_of(given: ExponentialMemoryConfig) -> ExponentialCore:
    core: ExponentialCore = ready(given.build_core(D))
    if core.log_scale is not None:
        with torch.no_grad():
            core.log_scale.copy_(torch.tensor([math.log(SCALE), math.log(0.6 * SCALE)]))
    return core


def sample(window: int = 1, *, forgets: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Gates]:
    """q, k, v [2, T, H, D] and gates."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*more: int) -> Tensor:
        return torch.randn(2, T, HEADS, *more, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(draw(D), dim=-1) for _ in range(2))
    log_alpha = F.logsigmoid(2 * draw()) if forgets else None
    gates = Gates(log_alpha, None, torch.sigmoid(draw()), torch.sigmoid(draw(window)))
    for x in (q, k, *gates):
        if x is not None:
            x.requires_grad_()
    return q, k, draw(D).requires_grad_(), gates


def whole(core: ExponentialCore, *given: Any) -> Tensor:
    return core(*given, SeqInfo.contiguous(2, given[0].shape[1]))


def kernel(core: ExponentialCore, q: Tensor, k: Tensor) -> Tensor:
    """[B, H] of vectors [B, H, D]."""
    return ((q * k).sum(-1) * core.scale(q) - core.scale(q)).exp()


def recurrence(core: ExponentialCore, q: Tensor, k: Tensor, v: Tensor, gates: Gates, bias: str) -> Tensor:
    """Token by token: the weight of every earlier token in the memory, as a list."""
    updates: list[Tensor] = []
    outputs = []

    def recall(z: Tensor) -> Tensor:
        parts = [u * kernel(core, z, k[:, s])[..., None] for s, u in enumerate(updates)]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(z)

    for t in range(q.shape[1]):
        window = range(min(gates.gamma.shape[-1], t + 1))
        errors = [v[:, t - j] - (recall(k[:, t - j]) if bias == "l2" else 0) for j in window]
        alpha = 1.0 if gates.log_alpha is None else gates.log_alpha[:, t, :, None].exp()
        updates = [alpha * u for u in updates] + [torch.zeros_like(v[:, t])]
        for j in window:
            rate = (gates.eta[:, t] * gates.gamma[:, t, :, j])[..., None]
            updates[t - j] = updates[t - j] + rate * errors[j]
        outputs.append(recall(q[:, t]))
    return torch.stack(outputs, dim=1)


def compare(a: Tensor, b: Tensor, leaves: list[Any]) -> None:
    """Equal values and equal gradients."""
    assert torch.allclose(a, b, atol=1e-11)
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(9), dtype=a.dtype)
    wanted = [x for x in leaves if x is not None]
    for x, y in zip(*(torch.autograd.grad((z * weights).sum(), wanted, retain_graph=True) for z in (a, b))):
        assert torch.allclose(x, y, atol=1e-10)


def taylor(degree: int, core: ExponentialCore) -> Outer:
    """The feature map cut off at `degree`: exp(-scale / 2) sqrt(scale)^|b| x^b / sqrt(b!) for all exponents b."""
    powers = [b for b in itertools.product(range(degree + 1), repeat=D) if sum(b) <= degree]
    exponents = torch.tensor(powers, dtype=torch.float64)
    root = torch.tensor([math.prod(math.factorial(n) for n in b) for b in powers], dtype=torch.float64).rsqrt()

    def lift(x: Tensor) -> Tensor:
        scale = core.scale(x)[:, None, None]
        raised = (scale.sqrt() * x)[..., None, :].pow(exponents).prod(-1)
        return raised * root * (-scale / 2).exp()

    return Outer(lift)


LINEAR = {
    "deep_transformer": {"preset": "deep_transformer", "memory": "matrix"},
    "swdt": {"preset": "swdt", "memory": "matrix", "window": 3},
    "swdt wide": {"preset": "swdt", "memory": "matrix", "window": T + 3},
    "dot": {"preset": "dot"},
    "dot window": {"preset": "dot", "window": 3, "gamma": "learned"},
    "dot wide": {"preset": "dot", "window": T + 3},
    "dot kept": {"preset": "dot", "retention": "none"},
    "dot fixed": {"preset": "dot", "learn_scale": False},
}


@pytest.mark.parametrize("keys", LINEAR.values(), ids=LINEAR.keys())
def test_linear_memories_equal_the_token_recurrence(keys: dict[str, Any]) -> None:
    """Dot is the triangular form U = (I + diag(eta) tril(kernel, -1))^-1 diag(eta) V, Y = tril(kernel) U."""
    given = config(**keys)
    core = core_of(given)
    q, k, v, gates = sample(given.window, forgets=given.forgets)
    leaves = [q, k, v, *gates, *core.parameters()]
    compare(whole(core, q, k, v, gates), recurrence(core, q, k, v, gates, given.bias), leaves)


def test_a_linear_deep_transformer_is_attention_without_a_denominator() -> None:
    """Times e^-scale for features of length 1."""
    core = core_of(config(retention="none", learn_scale=False))
    q, k, v, gates = sample(forgets=False)
    gates = gates._replace(eta=torch.ones_like(gates.eta), gamma=torch.ones_like(gates.gamma))
    weights = (torch.einsum("bthd,bshd->bhts", q, k) * SCALE).exp().tril()
    wanted = torch.einsum("bhts,bshd->bthd", weights, v) * math.exp(-SCALE)
    assert torch.allclose(whole(core, q, k, v, gates), wanted, atol=1e-12)


def test_a_window_of_one_is_the_deep_transformer() -> None:
    """Also where the rates stand in the cache instead of in the updates; linear and deep."""
    for memory in ("matrix", "mlp"):
        wide, narrow = (
            core_of(config(preset=p, memory=memory, **k))
            for p, k in (("swdt", {"window": 2}), ("deep_transformer", {}))
        )
        narrow.load_state_dict(wide.state_dict())
        q, k, v, gates = sample(2)
        alone = gates._replace(gamma=torch.stack([gates.gamma[..., 0], torch.zeros_like(gates.eta)], dim=-1))
        assert torch.allclose(
            whole(wide, q, k, v, alone), whole(narrow, q, k, v, gates._replace(gamma=gates.gamma[..., :1])), atol=1e-12
        )


@pytest.mark.parametrize("keys", LINEAR.values(), ids=LINEAR.keys())
def test_the_truncated_feature_map_converges_to_the_dual_form(keys: dict[str, Any]) -> None:
    """The ordinary memory with weights over monomials of degree <= p, gradients at the memory before each token."""
    given = config(**keys)
    core = core_of(given)
    q, k, v, gates = sample(given.window, forgets=given.forgets)
    tokens = each_tensor(Tokens(q, k, v, gates), lambda x: x.detach().transpose(1, 2))
    with torch.no_grad():
        exact = whole(core, q, k, v, gates).transpose(1, 2)
    form = Form("matrix", given.bias, window=given.window, block=1)
    gaps = []
    for degree in (1, 3, 6, 18):
        n = math.comb(D + degree, degree)
        outer = taylor(degree, core)
        y, _ = run_reference(form, outer, (torch.zeros(HEADS, D, n, dtype=torch.float64),), tokens)
        gaps.append(float((y.detach() - exact).abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1e-2 and gaps[-1] < 1e-9, gaps


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"retention": "none"},
        {"preset": "swdt", "window": 3},
        {"preset": "dot", "memory": "mlp", "chunk": 5},
        {"preset": "dot", "memory": "mlp", "chunk": 1, "retention": "none"},
        {"preset": "dot", "memory": "mlp", "chunk": 4, "window": 3},
    ],
    ids=str,
)
def test_deep_memories_equal_the_token_loop_over_the_truncated_map(keys: dict[str, Any]) -> None:
    """Inner gradients by autograd at the memory before the document or the chunk; its first layer acts on the monomials
    of degree 1, which are the keys themselves."""
    given = config(**({"preset": "deep_transformer", "expansion": 2} | keys))
    core = core_of(given)
    with torch.no_grad():
        core.w1.mul_(30)
    q, k, v, gates = sample(given.window, forgets=given.forgets)
    with torch.no_grad():
        exact = (whole(core, q, k, v, gates) - q).transpose(1, 2)
    # The memory adds its key to what it answers.
    target = v - k if given.bias == "l2" else v
    tokens = each_tensor(Tokens(q, k, target, gates), lambda x: x.detach().transpose(1, 2))
    scale = core.scale(q).detach()[:, None, None]
    gaps = []
    for degree in (1, 4, 18):
        w2 = torch.zeros(HEADS, core.n_hidden, math.comb(D + degree, degree), dtype=torch.float64)
        powers = [b for b in itertools.product(range(degree + 1), repeat=D) if sum(b) <= degree]
        columns = [powers.index(tuple(int(i == j) for i in range(D))) for j in range(D)]
        w2[..., columns] = core.w2.detach() / (scale.sqrt() * (-scale / 2).exp())
        form = Form("mlp", given.bias, window=given.window, block=T if given.bias == "dot" else given.n_chunk)
        y, _ = run_reference(form, taylor(degree, core), (core.w1.detach(), w2), tokens)
        gaps.append(float((y.detach() - exact).abs().max()))
    assert gaps[0] > 1e-3 and gaps[0] > gaps[1] and gaps[-1] < 1e-9, gaps


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_gate_of_zero_forgets(preset: str) -> None:
    """All earlier tokens outside the window."""
    given = config(preset=preset) if preset != "swdt" else config(preset=preset, window=3)
    core = core_of(given)
    q, k, v, gates = sample(given.window)
    assert gates.log_alpha is not None
    cut = gates._replace(log_alpha=gates.log_alpha.detach().index_fill(1, torch.tensor(6), -torch.inf))
    other = v.detach().clone()
    other[:, : 6 - given.window + 1] += 1.0
    with torch.no_grad():
        y, z = (whole(core, q, k, values, cut) for values in (v, other))
    if preset != "dot":
        assert torch.allclose(y[:, 6:], z[:, 6:], atol=1e-12)
    assert bool(torch.isfinite(y).all()) and not torch.allclose(y[:, :6], z[:, :6], atol=1e-3)


def test_presets_and_what_is_refused() -> None:
    assert set(PRESETS) == set(get_args(Preset))
    for name in PRESETS:
        made = config(preset=name)
        assert ExponentialMemoryConfig.model_validate(made.to_dict()) == made
    for keys, match in (
        ({"preset": "dot", "chunk": 4}, "chunk has no effect"),
        ({"preset": "swdt", "chunk": 4}, "chunk has no effect"),
        ({"preset": "dot", "expansion": 2}, "expansion has no effect"),
        ({"preset": "deep_transformer", "eta": "one", "eta_start": 0.5}, "eta_start has no effect"),
        ({"preset": "dot", "eta_start": 1.5}, "must be below 1"),
        ({"retention": "vector"}, "vector"),
        ({"preset": "dott"}, "dott"),
    ):
        with pytest.raises(ValueError, match=match):
            config(**keys)


@pytest.mark.parametrize("preset", get_args(Preset))
def test_drafts_cost_nothing_to_forget(preset: str) -> None:
    """Rows that accept different numbers of tokens go on as if the rest had never been."""
    module = ready(config(preset=preset, d_head=8).build(context()))
    x = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = module.new_state(2, 14, n_tentative=4, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        module.prefill(x[:, :5], SeqInfo.contiguous(2, 5), state)
        state.begin(4)
        module.prefill(x[:, 5:9], SeqInfo.contiguous(2, 4, start=5), state)
        state.commit(torch.tensor([1, 3]))
        y = module.prefill(x[:, 10:], SeqInfo.contiguous(2, 4, start=state.end()), state)
        for row, n in enumerate((6, 8)):
            alone = torch.cat([x[row : row + 1, :n], x[row : row + 1, 10:]], dim=1)
            expected = module(alone, SeqInfo.contiguous(1, n + 4))
            assert torch.allclose(y[row], expected[0, n:], atol=1e-10)
