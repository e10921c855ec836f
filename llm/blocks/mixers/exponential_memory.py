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

from kernels.test_time_memory.dual import delta_updates, exponential_kernel, kept, written
from kernels.test_time_memory.network import Bias
from kernels.test_time_memory.sequence import each_tensor
from llm.blocks.base import MIXERS, BuildCtx, Caps
from llm.blocks.mixers.test_time_memory import MemoryLayerConfig, MemoryMixer
from llm.blocks.test_time_memory import GateForm, Gates, wide, without_autocast
from llm.core.cost import Cost, Mode
from llm.core.errors import UserError
from llm.core.init import Init, constant
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, KVState, valid_counts

Preset = Literal["deep_transformer", "swdt", "dot"]

PRESETS: dict[str, dict[str, Any]] = {
    "deep_transformer": {"bias": "dot"},
    "swdt": {"bias": "dot", "window": 8, "gamma": "learned"},
    "dot": {"bias": "l2", "eta": "sigmoid"},
}
"""Published models as settings; whatever is not named keeps its default."""


def _tiny(preset: str, **more: Any) -> ExponentialMemoryConfig:
    return ExponentialMemoryConfig.model_validate({"preset": preset, "n_heads": 2, "d_head": 8} | more)


@MIXERS.register(
    "exponential_memory",
    tiny=lambda: _tiny("deep_transformer"),
    paper="arXiv:2505.23735",
    status="experimental",
    tinies={
        "swdt": lambda: _tiny("swdt", window=3, eta="softplus"),
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
        if self.eta == "one" and self.eta_start is not None:
            raise UserError("exponential_memory: eta_start has no effect with eta: one; remove one")
        if self.eta == "sigmoid" and (self.eta_start or 0.0) >= 1:
            raise UserError(f"exponential_memory: eta_start {self.eta_start} of a sigmoid must be below 1; lower it")
        return self

    @property
    def forgets(self) -> bool:
        """Whether there is a retention gate."""
        return self.retention != "none"

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
        params = h * (sum(self.gate_form().sections(d_head).values()) + self.learn_scale)
        seen = seq_len + 1.0 if mode == "decode" else (seq_len + 1) / 2
        pairs = 4.0 * d_head * seen
        if self.bias == "l2":
            pairs += 2.0 * d_head * (seen if mode != "decode" else 2 * seq_len + 1)
        return Cost(params, params, h * pairs, h * pairs, h * seq_len * (self.key_row(d_head) + d_head))


class Pairs(NamedTuple):
    """What a memory holds of S tokens: keys [B, H, S, d], updates [B, H, S, d_v], log_alpha [B, H, S] or None, rates
    [B, H, S, c] or None (the updates are already multiplied by them)."""

    keys: Tensor
    updates: Tensor
    log_alpha: Tensor | None
    rates: Tensor | None


class ExponentialCore(nn.Module):
    """The memories of all heads. log_scale [H]: of the features' kernel, where it learns."""

    def __init__(self, config: ExponentialMemoryConfig, d_head: int) -> None:
        super().__init__()
        self.config, self.d_head = config, d_head
        self.log_scale = nn.Parameter(torch.empty(config.n_heads)) if config.learn_scale else None

    def init_spec(self) -> dict[str, Init]:
        return {"log_scale": constant(math.log(self.config.scale))}

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
        assert isinstance(state, KVState)
        with without_autocast(q.device):
            q, k, v, gates = _heads_first(q, k, v, gates, state.k.dtype)
            n_new, end = q.shape[2], state.end()
            past, before = None, torch.ones(n_new, n_new, dtype=torch.bool, device=q.device).tril(-1)
            if self.config.bias == "l2" and state.extent:
                past = self._unpacked(state.k[:, : state.extent], state.v[:, : state.extent])
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
        log_alpha, eta = gates.log_alpha, gates.eta
        rates = eta[..., None] * gates.gamma
        if self.config.window > 1:
            return Pairs(k, v, log_alpha, rates)
        if self.config.bias == "dot":
            return Pairs(k, rates * v, log_alpha, None)
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
        return (exponential_kernel(q, pairs.keys, self.scale(q)) * write) @ pairs.updates

    def _packed(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Rows of the cache, [B, S, H, n] each."""
        parts = [pairs.keys]
        if pairs.log_alpha is not None:
            parts.append(pairs.log_alpha[..., None])
        if pairs.rates is not None:
            parts.append(pairs.rates)
        return torch.cat(parts, dim=-1).transpose(1, 2), pairs.updates.transpose(1, 2)

    def _unpacked(self, keys: Tensor, updates: Tensor) -> Pairs:
        d, forgets = self.d_head, self.config.forgets
        rows = keys.transpose(1, 2)
        log_alpha = rows[..., d] if forgets else None
        rates = rows[..., d + forgets :] if self.config.window > 1 else None
        return Pairs(rows[..., :d], updates.transpose(1, 2), log_alpha, rates)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVState:
        """An empty cache, in at least fp32."""
        row, n_heads = self.config.key_row(self.d_head), self.config.n_heads
        return KVState(batch, capacity + n_tentative, n_heads, row, self.d_head, dtype=wide(dtype), device=device)


class ExponentialMemory(MemoryMixer):
    """The layer around a memory, whose state is a cache that rolls back by moving its length."""

    caps = Caps(rollback="free")


def _heads_first(q: Tensor, k: Tensor, v: Tensor, gates: Gates, dtype: torch.dtype) -> tuple[Any, ...]:
    """(q, k, v, gates), [B, T, H, ...] -> [B, H, T, ...], all in one dtype."""
    return each_tensor((q, k, v, gates), lambda x: x.to(dtype).transpose(1, 2))
