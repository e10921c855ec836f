"""Parts of mixers whose memory learns while it reads: the memory with its decode state, and the gates of its updates.

Shapes: q, k, v [B, T, H, d] (d keys, queries and values of a head), gates [B, T, H, ...].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.test_time_memory import (
    Features,
    Form,
    Gates,
    LayerNorm,
    MemoryState,
    Outer,
    Past,
    Tokens,
    Weights,
    run_document,
    run_packed,
    run_rows,
)
from kernels.test_time_memory.cost import Sizes
from kernels.test_time_memory.features import DEGREE, monomials, n_monomials, n_orders
from kernels.test_time_memory.network import row_lengths
from kernels.test_time_memory.sequence import each_tensor
from llm.blocks.base import BuildCtx
from llm.core.init import Init, computed, constant, normal
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, RecurrentState, valid_counts
from llm.core.states.base import take_along

Retention = Literal["none", "const_head", "scalar", "vector"]
Tensors = dict[str, Tensor]

ALPHA_START, THETA_START, GAMMA_START = 4.6, 2.2, 2.0
"""Added to the sigmoid gates by default: 0.99 of the memory and 0.9 of the momentum are kept, tokens of the window
count 0.88."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, gates and inner gradients."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inner gradients are taken in fp32 under autocast too."""
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class GateForm:
    """Which gates a memory has. learned_gamma, mean: weights within the window, and whether they are divided by c.
    alpha_start, theta_start: what is kept per token at the start (None: `ALPHA_START`, `THETA_START`)."""

    retention: Retention
    momentum: bool
    eta: Literal["softplus", "sigmoid", "one"]
    eta_start: float
    window: int
    learned_gamma: bool
    mean: bool
    alpha_start: float | None = None
    theta_start: float | None = None

    def sections(self, d_head: int) -> dict[str, int]:
        """Numbers per head and token that a linear map gives, by gate."""
        wanted = {
            "alpha": {"scalar": 1, "vector": d_head}.get(self.retention, 0),
            "theta": int(self.momentum),
            "eta": int(self.eta != "one"),
            "gamma": self.window if self.learned_gamma else 0,
        }
        return {name: size for name, size in wanted.items() if size}

    def start(self, name: str) -> float:
        """What is added to a gate, so that zero parameters give its start."""
        if name == "gamma":
            return GAMMA_START
        if name in ("alpha", "theta"):
            usual, kept = {"alpha": (ALPHA_START, self.alpha_start), "theta": (THETA_START, self.theta_start)}[name]
            return usual if kept is None else _logit(kept)
        if self.eta == "sigmoid":
            return _logit(self.eta_start)
        return math.log(math.expm1(self.eta_start))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


class MemoryGates(nn.Module):
    """x [B, T, D] -> Gates [B, T, H, ...]: linear [D -> H * n], starting at zero, plus a bias per head."""

    def __init__(self, form: GateForm, n_heads: int, d_head: int, ctx: BuildCtx) -> None:
        super().__init__()
        self.form, self.n_heads = form, n_heads
        self.sections = form.sections(d_head)
        total = sum(self.sections.values())
        self.linear: nn.Module | None = None
        self.bias: HeadBias | None = None
        if total:
            config = ctx.linear_config("mixer.gates")
            self.linear = config.build(ctx.d_model, n_heads * total, bias=False, std=0.0, init=ctx.init)
            self.bias = HeadBias(n_heads, total)

    def forward(self, x: Tensor) -> Gates:
        form, dtype = self.form, wide(x.dtype)
        found: Tensors = {}
        if self.linear is not None and self.bias is not None:
            raw = self.bias(self.linear(x).unflatten(-1, (self.n_heads, -1)))
            parts = raw.split(list(self.sections.values()), dim=-1)
            found = {name: part + form.start(name) for name, part in zip(self.sections, parts)}
        shape = (*x.shape[:2], self.n_heads)
        one = torch.ones(shape, dtype=dtype, device=x.device)
        log_alpha = F.logsigmoid(found["alpha"]) if "alpha" in found else None
        if form.retention == "const_head":
            heads = torch.arange(self.n_heads, dtype=dtype, device=x.device)
            log_alpha = torch.log1p(-(2.0 ** (-5.0 - heads))).expand(shape)
        elif form.retention == "scalar":
            assert log_alpha is not None
            log_alpha = log_alpha[..., 0]
        log_theta = F.logsigmoid(found["theta"][..., 0]) if form.momentum else None
        eta = one
        if form.eta != "one":
            eta = (torch.sigmoid if form.eta == "sigmoid" else F.softplus)(found["eta"][..., 0])
        gamma = torch.sigmoid(found["gamma"]) if form.learned_gamma else one[..., None].expand(*shape, form.window)
        return Gates(log_alpha, log_theta, eta, gamma / form.window if form.mean else gamma)


class HeadBias(nn.Module):
    """bias [H, n], which is added in fp32."""

    def __init__(self, n_heads: int, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(n_heads, n))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        return x.to(dtype) + self.bias.to(dtype)

    def init_spec(self) -> dict[str, Init]:
        return {"bias": constant(0.0)}


@dataclass(frozen=True)
class CoreForm:
    """form, sizes: of the inner network and its optimiser. residual: the memory adds what it is asked.
    zero: it starts empty; else at learned weights. unit_features: lifted vectors are normalised.
    forgets: there is a retention gate. recompute: blocks are computed again in the backward pass."""

    form: Form
    sizes: Sizes
    forgets: bool
    residual: bool
    zero: bool
    unit_features: bool
    recompute: bool

    def parameter_shapes(self, n_heads: int) -> dict[str, tuple[int, ...]]:
        """Of everything that the memory learns outside."""
        sizes, form = self.sizes, self.form
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.zero:
            shapes |= {f"w{i + 1}": (n_heads, *shape) for i, shape in enumerate(sizes.weights(form))}
        if sizes.rank is not None:
            shapes["projection"] = (n_heads, sizes.rank, sizes.d)
        if sizes.phi != "id":
            shapes["degree_scale"] = (n_heads, 3 if sizes.phi.startswith("sketch") else DEGREE[sizes.phi] + 1)
        if form.normed:
            shapes |= {"norm_scale": (n_heads, sizes.d), "norm_shift": (n_heads, sizes.d)}
        return shapes


class MemoryCore(nn.Module):
    """The memories of all heads: initial weights w1 [H, d, hidden or D], w2, w3 [H, hidden, D], and the feature map."""

    def __init__(self, config: CoreForm, n_heads: int) -> None:
        super().__init__()
        self.config, self.form, self.sizes, self.n_heads = config, config.form, config.sizes, n_heads
        for name, shape in config.parameter_shapes(n_heads).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        for degree in self._degrees():
            n = n_monomials(self._width(), degree)
            self.register_buffer(f"monomials{degree}", torch.empty(n, degree, dtype=torch.int64), persistent=False)
            self.register_buffer(f"orders{degree}", torch.empty(n, dtype=torch.int64), persistent=False)
        for name, shape in self._sketches().items():
            self.register_buffer(name, torch.empty(shape))

    def init_spec(self) -> dict[str, Init]:
        sizes = self.sizes
        small, wide_start, deep = 0.02, sizes.lifted**-0.5, self.form.network != "matrix"
        if self.form.normed:
            # A layer norm divides gradients by the spread of what it gets: about 1 for unit keys, never tiny.
            small, wide_start = sizes.hidden**-0.5 if deep else 1.0, 1.0
        return {
            "w1": normal(small) if deep or self.form.normed else constant(0.0),
            "w2": normal(wide_start),
            "w3": normal(wide_start),
            "projection": normal(sizes.d**-0.5),
            "degree_scale": constant(1.0),
            "norm_scale": constant(1.0),
            "norm_shift": constant(0.0),
            **self._tables(),
            **dict.fromkeys(self._sketches(), normal(1.0)),
        }

    def _width(self) -> int:
        """What is lifted."""
        return self.sizes.rank or self.sizes.d

    def _degrees(self) -> range:
        """Degrees whose monomials are looked up in a table."""
        phi = self.sizes.phi
        return range(2, DEGREE[phi] + 1) if phi.startswith("poly") else range(0)

    def _tables(self) -> dict[str, Init]:
        width = self._width()
        tables: dict[str, Init] = {}
        for degree in self._degrees():
            tables[f"monomials{degree}"] = computed(partial(monomials, width, degree))
            tables[f"orders{degree}"] = computed(partial(n_orders, width, degree))
        return tables

    def _sketches(self) -> dict[str, tuple[int, ...]]:
        sizes = self.sizes
        if not sizes.phi.startswith("sketch"):
            return {}
        shapes: dict[str, tuple[int, ...]] = {"sketch2": (2, self._width(), sizes.sketch)}
        return shapes | ({"sketch4": (2, sizes.sketch, sizes.sketch)} if sizes.phi == "sketch4" else {})

    def outer(self, dtype: torch.dtype) -> Outer:
        """The feature map and the layer norm, with their tensors in `dtype`."""

        def get(name: str) -> Tensor | None:
            tensor = getattr(self, name, None)
            return None if tensor is None else tensor.to(dtype)

        scale, shift = get("norm_scale"), get("norm_shift")
        norm = None if scale is None or shift is None else LayerNorm(scale, shift)
        features = Features(
            self.sizes.phi,
            get("projection"),
            get("degree_scale"),
            tuple((getattr(self, f"monomials{d}"), getattr(self, f"orders{d}")) for d in self._degrees()),
            tuple(getattr(self, name) for name in self._sketches()),
            self.config.unit_features,
        )
        lengths = None
        if self.form.renormed:
            assert isinstance(self.w1, Tensor)
            lengths = row_lengths(self.initial(dtype, self.w1.device))
        return Outer(features, norm, lengths)

    def initial(self, dtype: torch.dtype, device: torch.device | str) -> Weights:
        """The weights [H, m, n] before a document."""
        shapes = self.sizes.weights(self.form)
        if self.config.zero:
            return tuple(torch.zeros(self.n_heads, *shape, dtype=dtype, device=device) for shape in shapes)
        return tuple(getattr(self, f"w{i + 1}").to(dtype) for i in range(len(shapes)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seq: SeqInfo) -> Tensor:
        """Whole documents, [B, T, H, d] -> [B, T, H, d] in at least fp32."""
        dtype = wide(q.dtype)
        with without_autocast(q.device):
            q, k = q.to(dtype), k.to(dtype)
            tokens = _heads_first(q, k, self.targets(k, v), gates)
            outer, initial = self.outer(dtype), self.initial(dtype, q.device)
            if seq.packed:
                y = run_packed(self.form, outer, initial, tokens, seq.positions, recompute=self.config.recompute)
            else:
                state = MemoryState(tuple(w.expand(q.shape[0], *w.shape) for w in initial))
                y, _ = run_document(self.form, outer, state, tokens, recompute=self.config.recompute)
            y = y.transpose(1, 2)
            return y + q if self.config.residual else y

    def targets(self, k: Tensor, v: Tensor) -> Tensor:
        """What the network itself must answer: with a residual, the keys come on top."""
        v = v.to(k.dtype)
        return v - k if self.config.residual and self.form.bias == "l2" else v

    def extend(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seq: SeqInfo, state: DecodeState) -> Tensor:
        """The tokens after those in `state`, which is advanced by the real ones; [B, T, H, d] -> [B, T, H, d]."""
        assert isinstance(state, RecurrentState)
        tensors = state.read()
        dtype = next(iter(tensors.values())).dtype
        counts = valid_counts(seq)
        counts = torch.full_like(state.length, q.shape[1]) if counts is None else counts
        with without_autocast(q.device):
            q, k = q.to(dtype), k.to(dtype)
            factors = {"k": k, "v": self.targets(k, v)}
            factors |= {name: gate.to(dtype) for name, gate in gates._asdict().items() if gate is not None}
            y, final = self._advance(tensors, factors, counts, q)
            assert y is not None
            state.write(final, counts, factors=factors)
            return y + q if self.config.residual else y

    def replay(self, tensors: Tensors, factors: Tensors, counts: Tensor) -> Tensors:
        """The state after the first counts[b] tokens of these factors."""
        with without_autocast(counts.device):
            return self._advance(tensors, factors, counts, None)[1]

    def _advance(
        self, tensors: Tensors, factors: Tensors, counts: Tensor, q: Tensor | None
    ) -> tuple[Tensor | None, Tensors]:
        form, halo = self.form, self.form.window - 1
        k, v = factors["k"], factors["v"]
        gates = Gates(factors.get("log_alpha"), factors.get("log_theta"), factors["eta"], factors["gamma"])
        n_weights = form.n_weights

        def group(name: str) -> Weights:
            return tuple(tensors[f"{name}{i + 1}"] for i in range(n_weights))

        state = MemoryState(
            group("memory"),
            group("momentum") if form.momentum else (),
            group("anchor") if "anchor1" in tensors else None,
            tensors.get("keep"),
            tensors.get("push"),
        )
        where = tensors["place"].long() if "place" in tensors else torch.zeros_like(counts)[:, None].expand(-1, 2)
        old_k = tensors.get("keys", k[:, :0])
        old_v = tensors.get("values", v[:, :0])
        past = Past(old_k.transpose(1, 2), old_v.transpose(1, 2), where[:, 1], where[:, 0])
        y, state = run_rows(form, self.outer(k.dtype), state, past, _heads_first(q, k, v, gates), counts)
        final: Tensors = {}
        for name, weights in (("memory", state.memory), ("momentum", state.momentum), ("anchor", state.anchor or ())):
            final |= {f"{name}{i + 1}": w for i, w in enumerate(weights)}
        if state.keep is not None and state.push is not None:
            final |= {"keep": state.keep, "push": state.push}
        if halo:
            index = counts[:, None] + torch.arange(halo, device=counts.device)
            final["keys"] = take_along(torch.cat([old_k, k], dim=1), index)
            final["values"] = take_along(torch.cat([old_v, v], dim=1), index)
        if "place" in tensors:
            place = [(where[:, 0] + counts) % form.block, (where[:, 1] + counts).clamp(max=halo)]
            final["place"] = torch.stack(place, dim=1).to(k.dtype)
        return None if y is None else y.transpose(1, 2), final

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
    ) -> RecurrentState:
        """A state at the initial weights, whatever the capacity."""
        dtype = wide(dtype)
        shapes = dict(self._state_shapes())
        h, d, c = self.n_heads, self.sizes.d, self.form.window
        factors: dict[str, tuple[int, ...]] = {"k": (h, d), "v": (h, d), "eta": (h,), "gamma": (h, c)}
        if self.config.forgets:
            factors["log_alpha"] = (h, d) if self.sizes.vector else (h,)
        if self.form.momentum:
            factors["log_theta"] = (h,)
        state = RecurrentState(
            batch,
            shapes,
            n_tentative=n_tentative,
            policy="replay",
            factors=factors,
            update=self.replay,
            dtype=dtype,
            device=device,
        )
        for index, weight in enumerate(self.initial(dtype, device)):
            for name in ("memory", "anchor"):
                if f"{name}{index + 1}" in shapes:
                    state.committed[f"{name}{index + 1}"].copy_(weight.detach())
        if "keep" in shapes:
            state.committed["keep"].fill_(1.0)
        return state

    def _state_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        form, h = self.form, self.n_heads
        for index, shape in enumerate(self.sizes.weights(form)):
            yield f"memory{index + 1}", (h, *shape)
            if form.momentum:
                yield f"momentum{index + 1}", (h, *shape)
            if form.aligned and not form.muon_block:
                yield f"anchor{index + 1}", (h, *shape)
        if form.aligned and form.muon_block:
            yield "keep", (h,)
            yield "push", (h,)
        if form.window > 1:
            yield "keys", (form.window - 1, h, self.sizes.d)
            yield "values", (form.window - 1, h, self.sizes.d)
        if form.aligned or form.window > 1:
            yield "place", (2,)


def _heads_first(q: Tensor | None, k: Tensor, v: Tensor, gates: Gates) -> Tokens:
    """[B, T, H, ...] -> [B, H, T, ...]"""
    return each_tensor(Tokens(q, k, v, gates), lambda x: x.transpose(1, 2))
