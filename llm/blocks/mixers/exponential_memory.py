"""Memories over the exact exponential feature map: DeepTransformer, SWDT and Dot of ATLAS, with a cache of all tokens.

The map is infinite, so that a memory is never folded into weights: what it holds are the keys and updates of all
earlier tokens, as in attention. Behrouz et al. 2025 (arXiv:2505.23735).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.test_time_memory.dual import delta_updates, exponential_kernel, kept, kept_from_start, written
from kernels.test_time_memory.network import Bias, Form, Weights, gelu, gradient_factors, times
from kernels.test_time_memory.sequence import each_tensor
from llm.blocks.base import MIXERS, BuildCtx, Caps
from llm.blocks.mixers.test_time_memory import MemoryLayerConfig, MemoryMixer
from llm.blocks.test_time_memory import GateForm, Gates, wide, without_autocast
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant, normal
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, KeyValueState, KVState, valid_counts

Preset = Literal["deep_transformer", "swdt", "dot"]

PRESETS: dict[str, dict[str, Any]] = {
    "deep_transformer": {"memory": "mlp", "bias": "dot", "eta": "softplus"},
    "swdt": {"memory": "mlp", "bias": "dot", "eta": "softplus", "window": 8, "gamma": "learned"},
    "dot": {"memory": "matrix", "bias": "l2", "eta": "sigmoid"},
}
"""Published models as settings; whatever is not named keeps its default."""

DEEP = Form("mlp", "dot")
"""The network and the loss of a deep memory."""


def _tiny(preset: str, **more: Any) -> ExponentialMemoryConfig:
    return ExponentialMemoryConfig.model_validate({"preset": preset, "n_heads": 2, "d_head": 8} | more)


@MIXERS.register(
    "exponential_memory",
    tiny=lambda: _tiny("deep_transformer", expansion=2),
    paper="arXiv:2505.23735",
    status="experimental",
    tinies={
        "swdt": lambda: _tiny("swdt", expansion=1, window=3, retention="const_head"),
        "linear_deep_transformer": lambda: _tiny("deep_transformer", memory="matrix", eta="one"),
        "linear_swdt": lambda: _tiny("swdt", memory="matrix", window=3),
        "dot": lambda: _tiny("dot"),
        "dot_kept": lambda: _tiny("dot", retention="none", learn_scale=False, conv=0, output_gate=False),
    },
    about=About(
        equation="M_t = α_t M_{t-1} + Σ_{j<c} η_t γ_{t,j} e_{t-j} φ*(k_{t-j})ᵀ, y_t = M_t φ*(q_t) with "
        "φ*(q)·φ*(k) = exp(s (q·k − 1)); e is the value (DeepTransformer, SWDT) or the error of the memory (Dot)",
        use="Transformers that forget and correct: attention without a denominator, and with a cache that learns.",
        weakness="Costs what attention costs in compute and in cache, without its fused kernels: each head holds "
        "several squares of T by T in training.",
    ),
)
class ExponentialMemoryConfig(MemoryLayerConfig):
    """A memory over all monomials of every degree, in dual form.

    preset: a published model; it fills the keys below, and keys given beside it override it.
    memory: "matrix" W φ(k), or "mlp" k + W_1 gelu(W_2 k) with hidden width expansion * d_head (None: 4): W_2 as it
    starts acts on keys and queries, what it learns on their features. Gradients are those of the memory before the
    document, so that all tokens are treated at once; with bias: dot alone.
    bias: inner loss, "dot" −⟨M(φ(k)), v⟩ (a token writes its value) or "l2" ½|M(φ(k)) − v|² (it writes its error, as
    the delta rule does).
    retention: what is kept of the memory per token: all, 1 − 2^(−5−h) of head h, or a learned gate per head.
    window, gamma, gamma_norm: losses of the last `window` tokens count, with weights 1 or learned ones, divided by
    their number unless gamma_norm is "none". More than one with bias: dot alone.
    eta, eta_start: form of the step size, and where it starts (None: 0.5 for a sigmoid, else 0.1). Lifted keys have
    length 1, so that the delta rule is stable below 2.
    scale, learn_scale: features are such that φ(q)·φ(k) = exp(scale (q·k − 1)); each head's scale learns, or stays.
    """

    preset: Preset | None = None
    memory: Literal["matrix", "mlp"] = "matrix"
    expansion: int | None = Field(None, ge=1)
    bias: Bias = "dot"
    retention: Literal["none", "const_head", "scalar"] = "scalar"
    window: int = Field(1, ge=1)
    gamma: Literal["one", "learned"] = "one"
    gamma_norm: Literal["mean", "none"] = "mean"
    eta: Literal["softplus", "sigmoid", "one"] = "one"
    eta_start: float | None = Field(None, gt=0)
    scale: float = Field(1.0, gt=0)
    learn_scale: bool = True

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") in get_args(Preset):
            return PRESETS[value["preset"]] | value
        return value

    @model_validator(mode="after")
    def _possible(self) -> ExponentialMemoryConfig:
        if self.bias == "l2" and self.window > 1:
            raise UserError(
                f"exponential_memory: window {self.window} with bias: l2 takes the error of each token {self.window} "
                f"times, which has no form over one square of tokens; use window: 1, or bias: dot"
            )
        if self.bias == "l2" and self.memory == "mlp":
            raise UserError(
                "exponential_memory: memory: mlp with bias: l2 has no closed form, each error depends on all before "
                "through the network; use memory: matrix or bias: dot, or test_time_memory with phi: poly2 and a chunk"
            )
        if self.memory == "matrix" and self.expansion is not None:
            raise UserError("exponential_memory: expansion has no effect with memory: matrix; remove it")
        if self.eta == "one" and self.eta_start is not None:
            raise UserError("exponential_memory: eta_start has no effect with eta: one; remove one")
        if self.eta == "sigmoid" and (self.eta_start or 0.0) >= 1:
            raise UserError(f"exponential_memory: eta_start {self.eta_start} of a sigmoid must be below 1; lower it")
        return self

    @property
    def forgets(self) -> bool:
        """Whether there is a retention gate."""
        return self.retention != "none"

    def hidden(self, d_head: int) -> int:
        """Width of the hidden layer; 0 where there is none."""
        return 0 if self.memory == "matrix" else (self.expansion or 4) * d_head

    def gate_form(self) -> GateForm:
        usual = 0.5 if self.eta == "sigmoid" else 0.1
        return GateForm(
            self.retention,
            momentum=False,
            eta=self.eta,
            eta_start=usual if self.eta_start is None else self.eta_start,
            window=self.window,
            learned_gamma=self.gamma == "learned",
            mean=self.gamma_norm == "mean",
        )

    def key_row(self, d_head: int) -> int:
        """Numbers that the cache holds of a token and head beside its updates: key, retention, rates of the window."""
        return d_head + self.forgets + (self.window if self.window > 1 else 0)

    def build(self, ctx: BuildCtx) -> ExponentialMemory:
        return ExponentialMemory(self, ctx)

    def build_core(self, d_head: int) -> ExponentialCore:
        return ExponentialCore(self, d_head)

    def core_cost(self, d_head: int, seq_len: int, mode: Mode) -> Cost:
        h = self.n_heads
        hidden = self.hidden(d_head)
        params = h * (sum(self.gate_form().sections(d_head).values()) + self.learn_scale + 2 * d_head * hidden)
        seen = seq_len + 1.0 if mode == "decode" else (seq_len + 1) / 2
        pairs = 4.0 * (d_head + hidden) * seen
        if self.bias == "l2":
            pairs += 2.0 * d_head * (seen if mode != "decode" else 2 * seq_len + 1)
        row = self.key_row(d_head) + d_head + 2 * hidden
        return Cost(params, params, h * (pairs + 8.0 * d_head * hidden), h * pairs, h * seq_len * row)


class Pairs(NamedTuple):
    """What a memory holds of S tokens: keys [B, H, S, d], updates [B, H, S, d_v], log_alpha [B, H, S] or None, rates
    [B, H, S, c] or None (the updates are already multiplied by them).

    hidden, first_updates [B, H, S, hidden]: of an MLP; both None otherwise."""

    keys: Tensor
    updates: Tensor
    log_alpha: Tensor | None
    rates: Tensor | None
    hidden: Tensor | None = None
    first_updates: Tensor | None = None


class ExponentialCore(nn.Module):
    """The memories of all heads. log_scale [H]: of the features' kernel, where it learns; w1 [H, d, hidden] and
    w2 [H, hidden, d]: initial weights of an MLP."""

    def __init__(self, config: ExponentialMemoryConfig, d_head: int) -> None:
        super().__init__()
        self.config, self.d_head = config, d_head
        self.n_hidden = config.hidden(d_head)
        self.log_scale = nn.Parameter(torch.empty(config.n_heads)) if config.learn_scale else None
        if self.n_hidden:
            self.w1 = nn.Parameter(torch.empty(config.n_heads, d_head, self.n_hidden))
            self.w2 = nn.Parameter(torch.empty(config.n_heads, self.n_hidden, d_head))

    def init_spec(self) -> dict[str, Init]:
        log_scale = constant(math.log(self.config.scale))
        return {"log_scale": log_scale, "w1": normal(0.02), "w2": normal(self.d_head**-0.5)}

    def scale(self, like: Tensor) -> Tensor:
        """[H], in the dtype of `like`."""
        if self.log_scale is None:
            return torch.full((self.config.n_heads,), self.config.scale, dtype=like.dtype, device=like.device)
        return self.log_scale.to(like.dtype).exp()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seq: SeqInfo) -> Tensor:
        """Whole documents, [B, T, H, d] -> [B, T, H, d] in at least fp32."""
        dtype = wide(q.dtype)
        with without_autocast(q.device):
            q, k, v, gates = _heads_first(q, k, v, gates, dtype)
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
            if seq.packed:
                documents = seq.document_ids()
                seen = seen & (documents[:, :, None] == documents[:, None, :])[:, None]
            pairs = self._write(k, v, gates, seen.tril(-1), None)
            return self._read(q, pairs, seen).transpose(1, 2)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seq: SeqInfo, state: DecodeState) -> Tensor:
        """The tokens after those in `state`, to which they are appended; [B, T, H, d] -> [B, T, H, d]."""
        assert isinstance(state, KeyValueState)
        with without_autocast(q.device):
            q, k, v, gates = _heads_first(q, k, v, gates, state.dtype)
            n_new, end = q.shape[2], state.end()
            past, before = None, torch.ones(n_new, n_new, dtype=torch.bool, device=q.device).tril(-1)
            if self.config.bias == "l2" and state.extent:
                past = self._unpacked(*state.read())
                held = torch.arange(state.extent, device=q.device) < end[:, None]
                both = (held[:, None].expand(-1, n_new, -1), before.expand(state.batch, -1, -1))
                before = torch.cat(both, dim=-1)[:, None]
            keys, updates = self._packed(self._write(k, v, gates, before, past))
            keys, updates, positions = state.append(keys, updates, valid_counts(seq))
            asked = end[:, None] + torch.arange(n_new, device=q.device)
            seen = (positions[:, None, :] <= asked[:, :, None])[:, None]
            return self._read(q, self._unpacked(keys, updates), seen).transpose(1, 2)

    def _write(self, k: Tensor, v: Tensor, gates: Gates, before: Tensor, past: Pairs | None) -> Pairs:
        """The pairs of these tokens. before: which tokens, those of the past first, each may know for its error."""
        log_alpha = gates.log_alpha
        rates = gates.eta[..., None] * gates.gamma
        if self.config.bias == "dot":
            windowed = self.config.window > 1
            hidden = first = None
            if self.n_hidden:
                (hidden, _), (_, error) = gradient_factors(DEEP, self._weights(k), k, v, None)
                first = -error if windowed else -rates * error
            return Pairs(k, v if windowed else rates * v, log_alpha, rates if windowed else None, hidden, first)
        all_log_alpha = log_alpha
        if past is not None and past.log_alpha is not None and log_alpha is not None:
            all_log_alpha = torch.cat([past.log_alpha, log_alpha], dim=-1)
        left = kept(all_log_alpha, before, k)
        old = None if past is None else (past.keys, past.updates)
        return Pairs(k, delta_updates(k, v, rates[..., 0], left, self.scale(k), old), log_alpha, None)

    def _read(self, q: Tensor, pairs: Pairs, seen: Tensor) -> Tensor:
        """y [B, H, T, d_v]: each query asks the memory after its own token."""
        write = kept(pairs.log_alpha, seen, q)
        if pairs.rates is not None:
            write = written(write, pairs.rates, seen)
        scores = exponential_kernel(q, pairs.keys, self.scale(q)) * write
        if pairs.hidden is None or pairs.first_updates is None:
            return scores @ pairs.updates
        w1, w2 = self._weights(q)
        start = kept_from_start(pairs.log_alpha, seen, q)
        asked = gelu(start * times(q, w2) + scores @ pairs.first_updates)
        return q + start * times(asked, w1) + ((asked @ pairs.hidden.mT) * write) @ pairs.updates

    def _weights(self, like: Tensor) -> Weights:
        return self.w1.to(like.dtype), self.w2.to(like.dtype)

    def _packed(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Rows of the cache, [B, S, H, n] each."""
        parts = [pairs.keys]
        if pairs.log_alpha is not None:
            parts.append(pairs.log_alpha[..., None])
        if pairs.rates is not None:
            parts.append(pairs.rates)
        updates = [x for x in (pairs.updates, pairs.hidden, pairs.first_updates) if x is not None]
        return torch.cat(parts, dim=-1).transpose(1, 2), torch.cat(updates, dim=-1).transpose(1, 2)

    def _unpacked(self, keys: Tensor, updates: Tensor) -> Pairs:
        d, forgets = self.d_head, self.config.forgets
        rows = keys.transpose(1, 2)
        log_alpha = rows[..., d] if forgets else None
        rates = rows[..., d + forgets :] if self.config.window > 1 else None
        updates, *deep = updates.transpose(1, 2).split([d] + [self.n_hidden] * (2 if self.n_hidden else 0), dim=-1)
        return Pairs(rows[..., :d], updates, log_alpha, rates, *deep)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVState:
        """An empty cache, in at least fp32."""
        n_heads, row, width = self.config.n_heads, self.config.key_row(self.d_head), self.d_head + 2 * self.n_hidden
        return KVState(batch, capacity + n_tentative, n_heads, row, width, dtype=wide(dtype), device=device)


class ExponentialMemory(MemoryMixer):
    """The layer around a memory, whose state is a cache that rolls back by moving its length."""

    caps = Caps(rollback="free")


def _heads_first(q: Tensor, k: Tensor, v: Tensor, gates: Gates, dtype: torch.dtype) -> tuple[Any, ...]:
    """(q, k, v, gates), [B, T, H, ...] -> [B, H, T, ...], all in one dtype."""
    return each_tensor((q, k, v, gates), lambda x: x.to(dtype).transpose(1, 2))
