"""Memories over the exact exponential feature map: DeepTransformer, SWDT and Dot of ATLAS, with a cache of all tokens.

The map is infinite, so that a memory is never folded into weights: what it holds are the keys and updates of all
earlier tokens, as in attention. Behrouz et al. 2025 (arXiv:2505.23735).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.test_time_memory.dual import (
    DeepMemory,
    delta_updates,
    each_update,
    exponential_kernel,
    kept,
    kept_from_start,
    windows,
    written,
)
from kernels.test_time_memory.network import Bias, Form, Weights, gradient_factors
from kernels.test_time_memory.sequence import each_tensor
from llm.blocks.base import MIXERS, BuildCtx, Caps
from llm.blocks.mixers.test_time_memory import MemoryLayerConfig, MemoryMixer
from llm.blocks.test_time_memory import GateForm, Gates, wide, without_autocast
from llm.core.cost import Cost, Mode
from llm.core.document_rows import DocumentRows
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
        "dot_window": lambda: _tiny("dot", window=3, gamma="learned"),
        "deep_dot": lambda: _tiny("dot", memory="mlp", expansion=1, chunk=4, window=2, gamma="learned"),
        "dot_kept": lambda: _tiny("dot", retention="none", learn_scale=False, conv=0, output_gate=False),
    },
    about=About(
        equation="M_t = α_t M_{t-1} + Σ_{j<c} η_t γ_{t,j} e_{t-j} φ*(k_{t-j})ᵀ, y_t = M_t φ*(q_t) with "
        "φ*(q)·φ*(k) = exp(s (q·k − 1)); e is the value (DeepTransformer, SWDT) or the error of the memory (Dot); M is "
        "a matrix or an MLP",
        use="Transformers that forget and correct: attention without a denominator, and with a cache that learns.",
        weakness="Costs what attention costs in compute and in cache, without its fused kernels: each head holds "
        "several squares of T by T in training, Dot with a window of c the square of c T; a deep Dot runs in chunks.",
    ),
)
class ExponentialMemoryConfig(MemoryLayerConfig):
    """A memory over all monomials of every degree, in dual form.

    preset: a published model; it fills the keys below, and keys given beside it override it.
    memory: "matrix" W φ(k), or "mlp" k + W_1 gelu(W_2 k) with hidden width expansion * d_head (None: 4): W_2 as it
    starts acts on keys and queries, what it learns on their features. With bias: dot gradients are those of the memory
    before the document, so that all tokens are treated at once; with bias: l2 those of the memory before the chunk.
    chunk: of memory: mlp with bias: l2 alone (None: 16); part of what the model is, and chunks run one after another.
    bias: inner loss, "dot" −⟨M(φ(k)), v⟩ (a token writes its value) or "l2" ½|M(φ(k)) − v|² (it writes its error, as
    the delta rule does).
    retention: what is kept of the memory per token: all, 1 − 2^(−5−h) of head h, or a learned gate per head.
    window, gamma, gamma_norm: losses of the last `window` tokens count, with weights 1 or learned ones, divided by
    their number unless gamma_norm is "none". With bias: l2 each of them counts with its error at that time (the Omega
    rule), so that a token writes `window` updates, and costs the square of that.
    eta, eta_start: form of the step size, and where it starts (None: 0.5 for a sigmoid, else 0.1). Lifted keys have
    length 1, so that the delta rule is stable below 2.
    scale, learn_scale: features are such that φ(q)·φ(k) = exp(scale (q·k − 1)); each head's scale learns, or stays.
    """

    preset: Preset | None = None
    memory: Literal["matrix", "mlp"] = "matrix"
    expansion: int | None = Field(None, ge=1)
    bias: Bias = "dot"
    retention: Literal["none", "const_head", "scalar"] = "scalar"
    chunk: int | None = Field(None, ge=1)
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
        if self.chunk is not None and not self.deep_errors:
            raise UserError(
                f"exponential_memory: chunk has no effect with memory: {self.memory} and bias: {self.bias}, which "
                "treat all tokens at once; it is for memory: mlp with bias: l2; remove it"
            )
        if self.memory == "matrix" and self.expansion is not None:
            raise UserError("exponential_memory: expansion has no effect with memory: matrix; remove it")
        if self.eta == "one" and self.eta_start is not None:
            raise UserError("exponential_memory: eta_start has no effect with eta: one; remove one")
        if self.eta == "sigmoid" and (self.eta_start or 0.0) >= 1:
            raise UserError(f"exponential_memory: eta_start {self.eta_start} of a sigmoid must be below 1; lower it")
        return self

    @property
    def deep_errors(self) -> bool:
        """Whether errors depend on all before through a network, so that chunks run one after another."""
        return self.memory == "mlp" and self.bias == "l2"

    @property
    def n_chunk(self) -> int:
        """Tokens whose errors are taken at one memory, with `deep_errors`."""
        return self.chunk or 16

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

    def causal_share(self, seq_len: int) -> float:
        usual = super().causal_share(seq_len)
        if not self.deep_errors:
            return usual
        # Reading multiplies the whole square, errors only what stands before their chunk.
        errors = 1.5 * self.n_updates * _mean_before(seq_len, self.n_chunk)
        return (seq_len * usual + errors) / (seq_len + errors)

    def key_row(self, d_head: int) -> int:
        """Numbers that the cache holds of a token and head beside its updates: key, retention, rates of the window."""
        return d_head + self.forgets + (self.window if self.window > 1 and self.bias == "dot" else 0)

    @property
    def n_updates(self) -> int:
        """Updates that a token writes: each with a key of its window, or one to its own."""
        return self.window if self.bias == "l2" else 1

    def update_row(self, d_head: int) -> int:
        """Numbers that the cache holds of a token's updates, and of its value where later tokens still need it."""
        return self.n_updates * (d_head + 2 * self.hidden(d_head)) + (d_head if self.n_updates > 1 else 0)

    def build(self, ctx: BuildCtx) -> ExponentialMemory:
        return ExponentialMemory(self, ctx)

    def build_core(self, d_head: int) -> ExponentialCore:
        return ExponentialCore(self, d_head)

    def core_cost(self, d_head: int, seq_len: int, mode: Mode) -> Cost:
        h = self.n_heads
        hidden = self.hidden(d_head)
        params = h * (sum(self.gate_form().sections(d_head).values()) + self.learn_scale + 2 * d_head * hidden)
        seen = seq_len + 1.0 if mode == "decode" else (seq_len + 1) / 2
        n = self.n_updates
        pairs = 4.0 * n * (d_head + hidden) * seen
        if self.deep_errors:
            before = _mean_before(seq_len, self.n_chunk) if mode != "decode" else seq_len
            pairs += 6.0 * n * n * (d_head + hidden) * before + (6.0 * n - 4.0) * d_head * hidden
        elif self.bias == "l2":
            pairs += 2.0 * n * n * d_head * (seen if mode != "decode" else 2 * seq_len + 1)
        row = self.key_row(d_head) + self.update_row(d_head)
        return Cost(params, params, h * (pairs + 8.0 * d_head * hidden), h * pairs, h * seq_len * row)


def _mean_before(n_tokens: int, chunk: int) -> float:
    """Tokens before a token's chunk, on average over n_tokens."""
    return sum(n - n % chunk for n in range(n_tokens)) / n_tokens


class Pairs(NamedTuple):
    """What a memory holds of S tokens: keys [B, H, S, d], updates [B, H, S * n, d_v], n a token, log_alpha [B, H, S] or
    None, rates [B, H, S, c] or None (the updates are already multiplied by them).

    The n updates of a token are with its own key, with that of the token before, and so on. hidden, first_updates
    [B, H, S * n, hidden]: of an MLP; both None otherwise. values [B, H, S, d_v]: where n > 1."""

    keys: Tensor
    updates: Tensor
    log_alpha: Tensor | None
    rates: Tensor | None
    hidden: Tensor | None = None
    first_updates: Tensor | None = None
    values: Tensor | None = None


class Known(NamedTuple):
    """Tokens with their windows, before their errors are known. before [B or 1, 1, T, P + T] and log_alpha
    [B, H, P + T], P tokens of the past first; keys, targets [B, H, T * c, d] and rates [B, H, T * c, 1]."""

    before: Tensor
    log_alpha: Tensor | None
    rates: Tensor
    keys: Tensor
    targets: Tensor


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
            if seq.packed and self.config.deep_errors:
                rows = DocumentRows(seq, q.shape[1])
                q, k, v, gates = each_tensor((q, k, v, gates), rows.split)
                return rows.join(self.forward(q, k, v, gates, SeqInfo.contiguous(*q.shape[:2], device=q.device)))
            q, k, v, gates = _heads_first(q, k, v, gates, dtype)
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
            if seq.packed:
                documents = seq.document_ids()
                seen = seen & (documents[:, :, None] == documents[:, None, :])[:, None]
            cuts = range(0, q.shape[2], self.config.n_chunk)
            pairs = self._write(k, v, gates, seen.tril(-1), seq.positions, cuts, None)
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
            asked = end[:, None] + torch.arange(n_new, device=q.device)
            cuts: Sequence[int] = (0,)
            if self.config.deep_errors and n_new > 1:
                chunk = self.config.n_chunk
                cuts = sorted({0, *(n for place in set(end.tolist()) for n in range(-place % chunk, n_new, chunk))})
            fresh = self._write(k, v, gates, before, asked, cuts, past)
            keys, updates, positions = state.append(*self._packed(fresh), valid_counts(seq))
            seen = (positions[:, None, :] <= asked[:, :, None])[:, None]
            return self._read(q, self._unpacked(keys, updates), seen).transpose(1, 2)

    def _write(
        self, k: Tensor, v: Tensor, gates: Gates, before: Tensor, positions: Tensor, cuts: Sequence[int],
        past: Pairs | None,
    ) -> Pairs:  # fmt: skip
        """The pairs of these tokens at positions [B, T] of their documents. before: which tokens, those of the past
        first, each may know for its error. cuts: where chunks begin in some row."""
        rates = gates.eta[..., None] * gates.gamma
        if self.config.bias == "dot":
            windowed = self.config.window > 1
            hidden = first = None
            if self.n_hidden:
                (hidden, _), (_, error) = gradient_factors(DEEP, self._weights(k), k, v, None)
                first = -error if windowed else -rates * error
            updates = v if windowed else rates * v
            return Pairs(k, updates, gates.log_alpha, rates if windowed else None, hidden, first)
        n, log_alpha = self.config.window, gates.log_alpha
        if past is not None and past.log_alpha is not None and log_alpha is not None:
            log_alpha = torch.cat([past.log_alpha, log_alpha], dim=-1)
        # The window reaches into the past, and not in front of the document.
        reaches = torch.arange(n, device=k.device) <= positions[..., None]
        rates = torch.where(reaches[:, None], rates, 0.0).flatten(2)[..., None]
        each_k, each_v = (self._windows(new, old, positions) for new, old in self._with_past(k, v, past))
        known = Known(before, log_alpha, rates, each_k, each_v)
        values = v if n > 1 else None
        if not self.n_hidden:
            return Pairs(k, self._write_linear(known, past), gates.log_alpha, None, values=values)
        updates, hidden, first = self._write_deep(known, positions, cuts, past)
        return Pairs(k, updates, gates.log_alpha, None, hidden, first, values)

    def _write_linear(self, known: Known, past: Pairs | None) -> Tensor:
        """The updates of a matrix, by one triangular system over all tokens."""
        n, keys = self.config.window, known.keys
        left = each_update(kept(known.log_alpha, known.before, keys), n).repeat_interleave(n, dim=-2)
        old = None if past is None else (windows(past.keys, n), past.updates)
        rates = known.rates[..., 0]
        return delta_updates(keys, known.targets, rates, left, self.scale(keys), old)

    def _write_deep(
        self, known: Known, positions: Tensor, cuts: Sequence[int], past: Pairs | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(updates, hidden, first updates) of an MLP, chunk by chunk."""
        n, chunk = self.config.window, self.config.n_chunk
        n_past = 0 if past is None else past.keys.shape[2]
        keys = known.keys
        pairs = [keys.new_zeros(*keys.shape[:2], 0, size) for size in (self.d_head, *(self.n_hidden,) * 2)]
        all_keys = keys
        if past is not None:
            assert past.hidden is not None and past.first_updates is not None
            pairs = [past.updates, past.hidden, past.first_updates]
            all_keys = torch.cat([windows(past.keys, n), keys], dim=2)
        places = torch.cat([torch.arange(n_past, device=keys.device).expand(len(positions), -1), positions], dim=1)
        for begin, end in zip(cuts, [*cuts[1:], positions.shape[1]]):
            own = slice(begin * n, end * n)
            anchor = positions[:, begin] - positions[:, begin] % chunk
            seen = places[:, : n_past + begin] < anchor[:, None]
            if n_past:
                seen = torch.cat([seen[:, :n_past] & known.before[:, 0, 0, :n_past], seen[:, n_past:]], dim=1)
            memory = self._memory(seen[:, None, None], known.log_alpha, all_keys, *pairs)
            z = keys[:, :, own]
            hidden, error, first = memory.errors(z, known.targets[:, :, own] - z)
            fresh = (-known.rates[:, :, own] * error, hidden, -known.rates[:, :, own] * first)
            pairs = [torch.cat(both, dim=2) for both in zip(pairs, fresh)]
        return tuple(x[:, :, n_past * n :] for x in pairs)  # type: ignore[return-value]

    def _memory(
        self, seen: Tensor, log_alpha: Tensor | None, keys: Tensor, updates: Tensor, hidden: Tensor, first: Tensor
    ) -> DeepMemory:
        """An MLP as seen [B, 1, T or 1, S] tells it; keys may be those of later tokens too."""
        n_tokens = seen.shape[-1]
        log_alpha = None if log_alpha is None else log_alpha[..., :n_tokens]
        w1, w2 = self._weights(keys)
        write = each_update(kept(log_alpha, seen, keys), self.config.n_updates)
        start = kept_from_start(log_alpha, seen, keys[:, :, :1])
        keys = keys[:, :, : updates.shape[2]]
        return DeepMemory(w1, w2, start, write, self.scale(keys), keys, updates, hidden, first)

    def _with_past(self, k: Tensor, v: Tensor, past: Pairs | None) -> list[tuple[Tensor, Tensor | None]]:
        return [(k, None if past is None else past.keys), (v, None if past is None else past.values)]

    def _windows(self, new: Tensor, old: Tensor | None, positions: Tensor) -> Tensor:
        """`windows` of new tokens [B, H, T, d] behind those in a cache [B, H, S, d], whose rows end apart."""
        n = self.config.window
        if n == 1 or old is None:
            return windows(new, n)
        index = (positions[:, :1] - n + 1 + torch.arange(n - 1, device=new.device)).clamp(min=0)
        index = index.clamp(max=old.shape[2] - 1)[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
        return windows(torch.cat([old.gather(2, index), new], dim=2), n)[:, :, (n - 1) * n :]

    def _read(self, q: Tensor, pairs: Pairs, seen: Tensor) -> Tensor:
        """y [B, H, T, d_v]: each query asks the memory after its own token."""
        n = self.config.n_updates
        keys = windows(pairs.keys, n)
        if self.config.deep_errors:
            assert pairs.hidden is not None and pairs.first_updates is not None
            memory = self._memory(seen, pairs.log_alpha, keys, pairs.updates, pairs.hidden, pairs.first_updates)
            return q + memory.ask(q)[2]
        write = kept(pairs.log_alpha, seen, q)
        if pairs.rates is not None:
            write = written(write, pairs.rates, seen)
        if pairs.hidden is None or pairs.first_updates is None:
            return (exponential_kernel(q, keys, self.scale(q)) * each_update(write, n)) @ pairs.updates
        w1, w2 = self._weights(q)
        start = kept_from_start(pairs.log_alpha, seen, q)
        parts = (pairs.keys, pairs.updates, pairs.hidden, pairs.first_updates)
        return q + DeepMemory(w1, w2, start, write, self.scale(q), *parts).ask(q)[2]

    def _weights(self, like: Tensor) -> Weights:
        return self.w1.to(like.dtype), self.w2.to(like.dtype)

    def _packed(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Rows of the cache, [B, S, H, n] each."""
        parts = [pairs.keys]
        if pairs.log_alpha is not None:
            parts.append(pairs.log_alpha[..., None])
        if pairs.rates is not None:
            parts.append(pairs.rates)
        n = self.config.n_updates
        updates = [x for x in (pairs.updates, pairs.hidden, pairs.first_updates) if x is not None]
        rows = [x.unflatten(2, (-1, n)).flatten(3) for x in updates]
        rows += [] if pairs.values is None else [pairs.values]
        return torch.cat(parts, dim=-1).transpose(1, 2), torch.cat(rows, dim=-1).transpose(1, 2)

    def _unpacked(self, keys: Tensor, updates: Tensor) -> Pairs:
        d, forgets, n = self.d_head, self.config.forgets, self.config.n_updates
        rows = keys.transpose(1, 2)
        log_alpha = rows[..., d] if forgets else None
        rates = rows[..., d + forgets :] if self.config.window > 1 and n == 1 else None
        sizes = [n * d] + [n * self.n_hidden] * (2 if self.n_hidden else 0)
        row = updates.transpose(1, 2)
        values = row[..., sum(sizes) :] if n > 1 else None
        parts = row[..., : sum(sizes)].split(sizes, dim=-1)
        updates, *deep = (x.unflatten(-1, (n, -1)).flatten(2, 3) for x in parts)
        hidden, first = deep if deep else (None, None)
        return Pairs(rows[..., :d], updates, log_alpha, rates, hidden, first, values)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVState:
        """An empty cache, in at least fp32."""
        n_heads, row, width = self.config.n_heads, self.config.key_row(self.d_head), self.config.update_row(self.d_head)
        return KVState(batch, capacity + n_tentative, n_heads, row, width, dtype=wide(dtype), device=device)


class ExponentialMemory(MemoryMixer):
    """The layer around a memory, whose state is a cache that rolls back by moving its length."""

    caps = Caps(rollback="free")


def _heads_first(q: Tensor, k: Tensor, v: Tensor, gates: Gates, dtype: torch.dtype) -> tuple[Any, ...]:
    """(q, k, v, gates), [B, T, H, ...] -> [B, H, T, ...], all in one dtype."""
    return each_tensor((q, k, v, gates), lambda x: x.to(dtype).transpose(1, 2))
