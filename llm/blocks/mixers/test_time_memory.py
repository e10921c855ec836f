"""Test-time memory: linear attention, DeltaNet, TTT, Titans, OmegaNet and ATLAS as settings of one mixer.

The recurrent state is a small network per head, which an inner optimiser trains while the sequence is read: each token
lowers a loss over the keys and values of the last c tokens. Behrouz et al. 2025 (arXiv:2505.23735).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.test_time_memory.cost import Sizes, block_flops, state_elements
from kernels.test_time_memory.features import FeatureMap
from kernels.test_time_memory.network import Bias, Form, Network, Optimizer
from kernels.test_time_memory.newton_schulz import TABLES, Table
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.linears.dense import project, project_joined
from llm.blocks.short_conv import ShortConvolution, Tail, short_conv_cost
from llm.blocks.test_time_memory import CoreForm, GateForm, MemoryCore, MemoryGates, Retention, wide
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState

Preset = Literal[
    "linear_attention", "delta_net", "gated_delta_net", "ttt_linear", "ttt_mlp", "titans", "dla", "swla", "omeganet",
    "atlas", "atlas_pp",
]  # fmt: skip

_DELTA = {"memory": "matrix", "retention": "none", "opt": "gd", "eta": "sigmoid", "chunk": 1, "initial": "zero"}
_TTT = {"retention": "none", "opt": "gd", "chunk": 16, "inner_norm": True, "inner_residual": True}
_POLY = {"phi": "poly2", "phi_rank": 16, "opt": "gd"}
_OMEGA = _POLY | {"window": 8, "gamma": "learned"}

PRESETS: dict[str, dict[str, Any]] = {
    "linear_attention": _DELTA | {"bias": "dot", "eta": "one", "chunk": 64},
    "delta_net": _DELTA,
    "gated_delta_net": _DELTA | {"retention": "scalar", "grad_at": "decayed"},
    "ttt_linear": _TTT | {"memory": "matrix"},
    "ttt_mlp": _TTT | {"memory": "mlp"},
    "titans": {"opt": "momentum"},
    "dla": _POLY | {"bias": "dot"},
    "swla": _OMEGA | {"bias": "dot"},
    "omeganet": _OMEGA,
    "atlas": _OMEGA | {"opt": "muon"},
    "atlas_pp": _OMEGA | {"opt": "muon", "memory": "gated_mlp"},
}
"""Published models as settings; whatever is not named keeps its default."""

MOMENTUM_STEPS = 10.0
"""1 / (1 - 0.9), with what is kept of the momentum at the start: how often a gradient acts."""

EXACT_BLOCK = 32
"""Tokens whose triangular system is solved at once, where every token takes its gradient at the memory before it."""


def _tiny(preset: str, **more: Any) -> MemoryConfig:
    return MemoryConfig.model_validate({"preset": preset, "n_heads": 2, "d_head": 8, "chunk": 4} | more)


_SMALL = {"phi_rank": 2, "window": 3, "expansion": 2}


class MemoryLayerConfig(MixerConfig):
    """The layer around a memory, common to all of them.

    conv: width of the convolution on q, k, v (0: none). output_gate: the heads' outputs are gated by the input.
    """

    n_heads: int = Field(ge=1)
    d_head: int | None = Field(None, ge=1)
    conv: int = Field(4, ge=0)
    output_gate: bool = True

    @property
    def unit_keys(self) -> bool:
        """Whether queries and keys are scaled to length 1."""
        return True

    def head_width(self, d_model: int) -> int:
        """Width of a head."""
        if self.d_head is None and d_model % self.n_heads:
            raise UserError(
                f"{self.type_name}: d_model {d_model} is not divisible by n_heads {self.n_heads}; "
                "set d_head or change one"
            )
        return self.d_head or d_model // self.n_heads

    def must_fill(self, d_model: int, hybrid: str) -> None:
        """UserError of a hybrid whose memory is not d_model wide."""
        width = self.n_heads * self.head_width(d_model)
        if width != d_model:
            raise UserError(
                f"{hybrid}: the heads of the memory must be d_model {d_model} wide together, not {width}; "
                "remove memory.d_head"
            )

    def gate_form(self) -> GateForm:
        """The gates of the updates."""
        raise NotImplementedError

    def build_core(self, d_head: int) -> nn.Module:
        """The memories of all heads: forward, extend and new_state as `MemoryCore` has them."""
        raise NotImplementedError

    def core_cost(self, d_head: int, seq_len: int, mode: Mode) -> Cost:
        """The memories of all heads, their gates' biases included; the state in elements of at least fp32."""
        raise NotImplementedError

    def cost(self, dims: Dims, seq_len: int, mode: Mode, *, project: bool = True) -> Cost:
        d, d_head = dims.d_model, self.head_width(dims.d_model)
        inner = self.n_heads * d_head
        cost = sum((dims.linear(d, inner, role=f"mixer.{name}") for name in "qkv"), Cost())
        cost = cost + dims.norm(d_head, role="mixer.norm")
        if project:
            cost = cost + dims.linear(inner, d, role="mixer.out")
        if self.output_gate:
            cost = cost + dims.linear(d, inner, role="mixer.gate")
        n_gates = self.n_heads * sum(self.gate_form().sections(d_head).values())
        if n_gates:
            cost = cost + dims.linear(d, n_gates, role="mixer.gates")
        if self.conv:
            cost = cost + short_conv_cost(3 * inner, self.conv, False, dims.state_dtype_bytes)
        core = self.core_cost(d_head, seq_len, mode)
        return cost + replace(core, state_bytes_per_seq=core.state_bytes_per_seq * max(4, dims.state_dtype_bytes))


@MIXERS.register(
    "test_time_memory",
    tiny=lambda: _tiny("titans", window=2),
    paper="arXiv:2505.23735",
    status="experimental",
    tinies={
        "linear_attention": lambda: _tiny("linear_attention"),
        "delta_net": lambda: _tiny("delta_net", chunk=1),
        "gated_delta_net": lambda: _tiny("gated_delta_net", chunk=1, initial="learned", opt="momentum"),
        "ttt_linear": lambda: _tiny("ttt_linear", recompute=True),
        "vector": lambda: _tiny("linear_attention", bias="l2", retention="vector", eta="sigmoid", window=2, conv=0),
        "ttt_mlp": lambda: _tiny("ttt_mlp", retention="const_head", eta="sigmoid"),
        "swla": lambda: _tiny("swla", memory="gated_mlp", phi="poly3", phi_rank=2, window=3, expansion=2),
        "omeganet": lambda: _tiny("omeganet", **_SMALL, read="pre", chunk=8),
        "sketch": lambda: _tiny("omeganet", phi="sketch4", phi_rank=None, sketch_size=6, window=2, gamma="one"),
        "atlas": lambda: _tiny("atlas", **_SMALL, ns_steps=2, chunk=8),
        "muon_matrix": lambda: _tiny(
            "atlas", memory="matrix", phi="id", eta_inside=True, window=2, ns_table="lact", chunk=8, output_gate=False
        ),
    },
    about=About(
        equation="S_t = θ_t S_{t-1} − Σ_{j<c} γ_{t,j} ∇ℓ(M; k_{t-j}, v_{t-j}), M_t = α_t M_{t-1} + η_t NS(S_t), "
        "y_t = M_t(φ(q_t)); presets switch the parts on and off, from linear attention to ATLAS",
        use="Long contexts at a constant state; linear recurrences, Titans and ATLAS compared on equal terms.",
        weakness="Slower than attention at ordinary lengths, by orders of magnitude with one Newton-Schulz per token; "
        "recall in context stays below attention's, and a model must be run with the chunk it was trained with. "
        "Newton-Schulz raises singular values near rounding to the size of large ones, so that fp32 tells cuts apart.",
    ),
)
class MemoryConfig(MemoryLayerConfig):
    """A memory that is trained while it reads.

    preset: a published model; it fills the keys below, and keys given beside it override it.
    memory: "matrix" W φ(k), "mlp" W_1 gelu(W_2 φ(k)), "gated_mlp"; hidden width expansion * d_head.
    bias: inner loss, "l2" ½|M(φ(k)) − v|² or "dot" −⟨M(φ(k)), v⟩.
    retention: what is kept of the memory per token: all, 1 − 2^(−5−h) of head h, or a learned gate per head ("scalar")
    or per key channel ("vector").
    grad_at: gradients at the decayed memory (as gated DeltaNet) instead of the one before; for chunk 1.
    window, gamma, gamma_norm: losses of the last `window` tokens count, with weights 1 or learned ones, divided by
    their number unless gamma_norm is "none" (which diverges easily).
    phi: lifts keys and queries to all monomials of degree ≤ 2 or 3, or to `sketch_size` random features of degree 2 or
    4; phi_rank: projects to this width first; phi_norm: lifted vectors have unit norm.
    opt: gradient descent, momentum (Titans), or momentum orthogonalised by ns_steps Newton-Schulz iterations of
    ns_table; ns_granularity: for every "token", or once per "chunk" (for hybrids with attention alone, since its tokens
    read the memory before the chunk). eta_inside: step sizes act on gradients, not on the orthogonalised momentum.
    eta, eta_start: form of the step size, and where it starts (None: 0.5 for a sigmoid without momentum, 0.01 for
    muon, else 0.1 or what keeps a chunk of equal keys from overshooting, if that is less).
    alpha_start, theta_start: what is kept of the memory and of the momentum per token before anything is learned (None:
    0.99 and 0.9, with which a memory has nearly forgotten after 500 tokens); alpha_start for the learned retentions.
    weight_renorm: "rows" scales the rows of all weights back to their first lengths after each chunk; "none" is the
    papers' equations, which diverge in training or let a memory shrink to nothing. None: rows for networks without
    inner_norm that gradient descent or momentum trains, else none.
    chunk: gradients are taken at the memory before the chunk; part of what the model is, not only of its speed.
    read: tokens are read before ("pre") or after their own write.
    inner_norm, inner_residual: the memory is q + LN(M(q)) as in TTT (inner_residual None: for MLP memories).
    initial: where documents begin: at learned weights or at zero.
    recompute: keep only the states between chunks for the backward pass.
    """

    preset: Preset | None = None
    memory: Network = "mlp"
    expansion: int = Field(4, ge=1)
    bias: Bias = "l2"
    retention: Retention = "scalar"
    grad_at: Literal["undecayed", "decayed"] = "undecayed"
    window: int = Field(1, ge=1)
    gamma: Literal["one", "learned"] = "one"
    gamma_norm: Literal["mean", "none"] = "mean"
    phi: FeatureMap = "id"
    phi_rank: int | None = Field(None, ge=1)
    phi_norm: bool = True
    sketch_size: int | None = Field(None, ge=1)
    opt: Optimizer = "momentum"
    ns_steps: int | None = Field(None, ge=1)
    ns_table: Table | None = None
    ns_granularity: Literal["token", "chunk"] | None = None
    eta_inside: bool = False
    eta: Literal["softplus", "sigmoid", "one"] = "softplus"
    eta_start: float | None = Field(None, gt=0)
    alpha_start: float | None = Field(None, gt=0, lt=1)
    theta_start: float | None = Field(None, gt=0, lt=1)
    weight_renorm: Literal["none", "rows"] | None = None
    chunk: int = Field(32, ge=1)
    read: Literal["pre", "post"] | None = None
    inner_norm: bool = False
    inner_residual: bool | None = None
    initial: Literal["learned", "zero"] = "learned"
    qk_norm: bool = True
    recompute: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") in get_args(Preset):
            preset = PRESETS[value["preset"]]
            if "phi" in value:
                preset = {key: given for key, given in preset.items() if key != "phi_rank"}
            return preset | value
        return value

    @model_validator(mode="after")
    def _possible(self) -> MemoryConfig:
        for wrong, message in self._conflicts():
            if wrong:
                raise UserError(f"test_time_memory: {message}")
        return self

    def _conflicts(self) -> list[tuple[bool, str]]:
        """(whether it is so, what to say)."""
        muon = self.opt == "muon"
        keys = [k for k in ("ns_steps", "ns_table", "ns_granularity") if getattr(self, k) is not None]
        keys += ["eta_inside"] * self.eta_inside
        last = len(TABLES.get(self.ns_table or "quintic", ())) or None
        sketched = self.phi.startswith("sketch")
        return [
            (bool(keys) and not muon, f"{', '.join(keys)} have no effect with opt {self.opt}; set opt: muon"),
            (last is not None and (self.ns_steps or 0) > (last or 0), f"ns_table {self.ns_table!r} has {last} steps, "
             f"not {self.ns_steps}; lower ns_steps or use ns_table: quintic"),
            (self.ns_granularity == "chunk" and self.read is not None, "with ns_granularity: chunk tokens read the "
             "memory before their chunk; remove read"),
            (self.retention == "vector" and (self.memory != "matrix" or self.phi != "id" or muon), "retention: vector "
             "needs memory: matrix, phi: id and opt: gd or momentum; use retention: scalar"),
            (self.grad_at == "decayed" and self.retention == "none", "grad_at: decayed has no effect with retention: "
             "none; remove one"),
            (self.grad_at == "decayed" and not self.exact, "grad_at: decayed needs memory: matrix, bias: l2, window 1, "
             f"chunk 1, no inner_norm and opt: gd or momentum (given: {self.memory}, {self.bias}, {self.window}, "
             f"{self.chunk}, {self.opt}); use grad_at: undecayed"),
            (self.phi == "id" and (self.phi_rank is not None or not self.phi_norm), "phi_rank and phi_norm have no "
             "effect with phi: id; choose another phi or remove them"),
            (sketched != (self.sketch_size is not None), "sketch_size goes with phi: sketch2 or sketch4, which need it "
             f"(given: phi {self.phi}, sketch_size {self.sketch_size})"),
            (self.weight_renorm == "rows" and not self.can_renorm, "weight_renorm: rows needs memory: mlp or "
             "gated_mlp, opt: gd or momentum and no inner_norm; remove it"),
            (self.eta == "one" and self.eta_start is not None, "eta_start has no effect with eta: one; remove one"),
            (self.alpha_start is not None and self.retention not in ("scalar", "vector"), "alpha_start has no effect "
             f"with retention: {self.retention}; use scalar or vector, or remove it"),
            (self.theta_start is not None and self.opt == "gd", "theta_start has no effect with opt: gd; remove it"),
            (self.eta == "sigmoid" and (self.eta_start or 0.0) >= 1, "eta_start of a sigmoid must be below 1"),
            (self.initial == "zero" and (self.memory != "matrix" or self.inner_norm), "initial: zero is for memory: "
             f"matrix without inner_norm, others stay there or leap away (given: {self.memory}); use initial: learned"),
        ]  # fmt: skip

    @property
    def exact(self) -> bool:
        """Whether every token takes its gradient at the memory before it, by a triangular system."""
        plain = self.memory == "matrix" and self.bias == "l2" and self.opt != "muon" and not self.inner_norm
        return plain and self.window == 1 and self.chunk == 1

    @property
    def can_renorm(self) -> bool:
        """Whether nothing else bounds the weights of the memory, and they may be scaled."""
        return self.memory != "matrix" and self.opt != "muon" and not self.inner_norm

    @property
    def unit_keys(self) -> bool:
        return self.qk_norm

    def head_width(self, d_model: int) -> int:
        width = super().head_width(d_model)
        if self.phi_rank is not None and self.phi_rank > width:
            raise UserError(
                f"test_time_memory: phi_rank {self.phi_rank} is more than the width of a head, {width}; lower it"
            )
        return width

    def form(self) -> Form:
        """The inner optimisation."""
        return Form(
            self.memory,
            self.bias,
            normed=self.inner_norm,
            optimizer=self.opt,
            window=self.window,
            block=EXACT_BLOCK if self.exact else self.chunk,
            exact=self.exact,
            decayed=self.grad_at == "decayed",
            pre=self.read == "pre",
            muon_block=self.ns_granularity == "chunk",
            ns_steps=self.ns_steps or 5,
            ns_table=self.ns_table or "quintic",
            eta_inside=self.eta_inside,
            renormed=self.can_renorm if self.weight_renorm is None else self.weight_renorm == "rows",
        )

    def core_form(self, d_head: int) -> CoreForm:
        """The memory of heads of this width."""
        residual = self.memory != "matrix" if self.inner_residual is None else self.inner_residual
        sizes = Sizes(
            d_head,
            self.expansion * d_head,
            self.phi,
            self.phi_rank,
            self.sketch_size or 0,
            vector=self.retention == "vector",
        )
        return CoreForm(
            self.form(),
            sizes,
            forgets=self.retention != "none",
            residual=residual,
            zero=self.initial == "zero",
            unit_features=self.phi_norm,
            recompute=self.recompute,
        )

    def gate_form(self) -> GateForm:
        # A chunk's gradients are all taken at one memory, and momentum repeats each of them.
        steps = self.chunk * (1.0 if self.opt == "gd" else MOMENTUM_STEPS)
        stable = min(0.1, 1.0 / steps)
        usual = {"gd": 0.5 if self.eta == "sigmoid" else stable, "momentum": stable, "muon": 0.01}
        return GateForm(
            self.retention,
            momentum=self.opt != "gd",
            eta=self.eta,
            eta_start=usual[self.opt] if self.eta_start is None else self.eta_start,
            window=self.window,
            learned_gamma=self.gamma == "learned",
            mean=self.gamma_norm == "mean",
            alpha_start=self.alpha_start,
            theta_start=self.theta_start,
        )

    def build(self, ctx: BuildCtx) -> MemoryMixer:
        if self.ns_granularity == "chunk":
            raise UserError(
                "test_time_memory: with ns_granularity: chunk no token sees its own chunk, which attention must "
                "supply; use memory_as_gate or memory_as_layer, or ns_granularity: token"
            )
        return MemoryMixer(self, ctx)

    def build_core(self, d_head: int) -> MemoryCore:
        return MemoryCore(self.core_form(d_head), self.n_heads)

    def core_cost(self, d_head: int, seq_len: int, mode: Mode) -> Cost:
        core = self.core_form(d_head)
        form, sizes, h = core.form, core.sizes, self.n_heads
        params = sum(torch.Size(shape).numel() for shape in core.parameter_shapes(h).values())
        params += h * sum(self.gate_form().sections(d_head).values())
        if mode == "decode":
            flops = block_flops(form, sizes, 1, ends=(seq_len + 1) % form.block == 0)
        else:
            n = min(form.block, seq_len)
            flops = block_flops(form, sizes, n) / n
        where = 2 if form.aligned or form.window > 1 else 0
        return Cost(params=params, active_params=params, flops_per_token=h * flops,
                    state_bytes_per_seq=h * state_elements(form, sizes) + where)  # fmt: skip


class MemoryMixer(TokenMixer):
    """q, k, v [D -> H * d], a convolution over all three, the memory, norm per head, gate and out (unless `project` is
    false: then what the heads give goes out as it is)."""

    caps = Caps(rollback="replay")

    def __init__(self, config: MemoryLayerConfig, ctx: BuildCtx, *, project: bool = True) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.head_width(ctx.d_model)
        inner = self.n_heads * self.d_head
        self.q = ctx.linear(ctx.d_model, inner, role="mixer.q")
        self.k = ctx.linear(ctx.d_model, inner, role="mixer.k")
        self.v = ctx.linear(ctx.d_model, inner, role="mixer.v")
        self.out = ctx.linear(inner, ctx.d_model, role="mixer.out") if project else nn.Identity()
        self.gate = ctx.linear(ctx.d_model, inner, role="mixer.gate") if config.output_gate else None
        self.conv = ShortConvolution(3 * inner, config.conv) if config.conv else None
        self.norm = ctx.norm(self.d_head, role="mixer.norm")
        self.gates = MemoryGates(config.gate_form(), self.n_heads, self.d_head, ctx)
        self.core: Any = config.build_core(self.d_head)
        self.qk_norm = config.unit_keys

    def _project(self, x: Tensor, seq: SeqInfo, state: DecodeState | Tail | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, d]; q and k in fp32."""
        joined = project_joined(x, self.q, self.k, self.v)
        if joined is None:
            joined = torch.cat(project(x, self.q, self.k, self.v), dim=-1)
        if self.conv is None:
            joined = F.silu(joined)
        elif state is None:
            joined = self.conv(joined, seq)
        else:
            assert isinstance(state, ConvState | Tail)
            joined = self.conv.extend(joined, seq, state)
        q, k, v = joined.unflatten(-1, (3, self.n_heads, self.d_head)).unbind(-3)
        if self.qk_norm:
            q, k = (F.normalize(y.to(wide(y.dtype)), dim=-1, eps=1e-6) for y in (q, k))
        return q, k, v

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.norm(y.to(x.dtype)).flatten(2)
        return self.out(y if self.gate is None else y * torch.sigmoid(self.gate(x)))

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        q, k, v = self._project(x, seq, None)
        return self._finish(x, self.core(q, k, v, self.gates(x), seq))

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        q, k, v = self._project(x, seq, state.parts.get("conv"))
        return self._finish(x, self.core.extend(q, k, v, self.gates(x), seq, state["memory"]))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        known: dict[str, Any] = {"n_tentative": n_tentative, "dtype": dtype, "device": device}
        parts: dict[str, DecodeState] = {"memory": self.core.new_state(batch, capacity, **known)}
        if self.conv is not None:
            parts["conv"] = self.conv.new_state(batch, **known)
        return CompositeState(parts)
