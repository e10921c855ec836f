"""Memory as context (Titans MAC): attention within a segment also reads what a test-time memory says of the past.

Behrouz et al. 2025 (arXiv:2501.00663). Shapes: x, a [B, T, D], q, k, v [B, T, H, d]; P persistent tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.test_time_memory import Block, MemoryState, Weights, recall, run_block
from kernels.test_time_memory.sequence import each_tensor
from llm.blocks.base import MIXERS, BuildCtx, Caps, MixerConfig, TokenMixer
from llm.blocks.feature_attention import head_width, slopes_of
from llm.blocks.linears.dense import project
from llm.blocks.mixers.test_time_memory import MemoryConfig, MemoryMixer
from llm.blocks.test_time_memory import wide, without_autocast
from llm.core.cost import Cost, Dims, Mode
from llm.core.document_rows import DocumentRows
from llm.core.errors import UserError
from llm.core.init import Init, normal
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import CompositeState, ConvState, DecodeState, RecurrentState, WindowState, valid_counts
from llm.core.states.base import take_along


def _tiny_memory(**keys: Any) -> MemoryConfig:
    return MemoryConfig.model_validate({"preset": "titans", "n_heads": 2, "chunk": 4, "expansion": 1} | keys)


@MIXERS.register(
    "memory_as_context",
    tiny=lambda: MemoryAsContextConfig(memory=_tiny_memory(), n_heads=2, n_persistent=3),
    tinies={
        "omega": lambda: MemoryAsContextConfig(memory=_tiny_memory(preset="omeganet", phi="id", window=3), n_heads=4),
        "atlas": lambda: MemoryAsContextConfig(
            memory=_tiny_memory(preset="atlas", phi="id", window=2, ns_granularity="chunk", ns_steps=2, conv=0),
            n_heads=2,
            n_persistent=1,
        ),
    },
    paper="arXiv:2501.00663",
    status="experimental",
    about=About(
        equation="r_t = M_s(q_t), a_t = attention of x_t over persistent tokens, r_≤t and x_≤t of segment s, "
        "y_t = W_o (norm(a_t) ⊙ σ(norm(M_t(a_t)))), M_s the memory before the segment, which a is written to",
        use="Exact attention to what is near, and to what the memory recalls of all before: long contexts, BABILong.",
        weakness="Segments run one after another, each with two sets of keys; a segment is a chunk of the memory, so "
        "both have one length; a token that opens a segment sees the one before through the memory alone; packed "
        "documents are laid out as rows as long as the longest.",
    ),
)
class MemoryAsContextConfig(MixerConfig):
    """A memory in the context of attention.

    memory: its settings; its chunk is the segment, since the memory before the segment is then the one that gradients
    are taken at. n_heads: of attention. n_persistent: learned tokens that every token sees.
    What the memory recalls for a token is visible from that token on, since it depends on the token; the paper puts
    what is recalled for a whole segment in front of it, which is not causal.
    """

    memory: MemoryConfig
    n_heads: int = Field(ge=1)
    n_persistent: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _has_segments(self) -> MemoryAsContextConfig:
        if not self.memory.form().aligned:
            raise UserError(
                "memory_as_context: the memory must keep what it was before its chunk; give it a chunk above 1, and "
                "bias: l2 or memory: mlp"
            )
        return self

    def build(self, ctx: BuildCtx) -> TokenMixer:
        self.memory.must_fill(ctx.d_model, self.type_name)
        return MemoryAsContext(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        d, c, n_persistent = dims.d_model, self.memory.chunk, self.n_persistent
        d_head = self.memory.head_width(d)
        maps = {name: dims.linear(d, d, role=f"mixer.{name}") for name in ("q", "k", "v", "out")}
        cost = self.memory.cost(dims, seq_len, mode, project=False) + sum(maps.values(), Cost())
        for role in ("retrieved_norm", "attention_norm", "memory_norm"):
            cost = cost + dims.norm(d, role=f"mixer.{role}")
        if mode == "decode":
            n_tokens, seen = 1, float(2 * c + n_persistent)
        else:
            whole, rest = divmod(seq_len, c)
            n_tokens = seq_len
            seen = (whole * c * (2 * c + n_persistent) + rest * (2 * rest + n_persistent)) / seq_len
        again = maps["k"].flops_per_token + maps["v"].flops_per_token
        form, sizes = self.memory.form(), self.memory.core_form(d_head).sizes
        recalled = 2.0 * sum(m * n for m, n in sizes.weights(form)) + sizes.lift_flops()
        flops = again * (1 + n_persistent / n_tokens) + maps["q"].flops_per_token
        flops += self.memory.n_heads * recalled + 4.0 * d * seen
        return cost + Cost(
            params=n_persistent * d,
            active_params=n_persistent * d,
            flops_per_token=flops,
            state_bytes_per_seq=4 * d * c * dims.state_dtype_bytes,
        )


class Keys(NamedTuple):
    """k, v [B, S, 2 H, d]: of tokens, then of what was recalled for them; positions [B, S], negative: none."""

    k: Tensor
    v: Tensor
    positions: Tensor


class MemoryAsContext(TokenMixer):
    """q, k, v, out [D -> D], persistent [P, D], and a memory without an output projection.

    The state holds the keys and values of the last segment, of tokens and of what was recalled, and the memory's state.
    """

    caps = Caps(rollback="replay", needs_positions=True)

    def __init__(self, config: MemoryAsContextConfig, ctx: BuildCtx) -> None:
        super().__init__()
        d = ctx.d_model
        self.n_heads, self.chunk = config.n_heads, config.memory.chunk
        self.d_head = head_width(config.type, d, config.n_heads, None)
        self.q, self.k, self.v = (ctx.linear(d, d, role=f"mixer.{name}") for name in "qkv")
        self.out = ctx.linear(d, d, role="mixer.out")
        self.memory = MemoryMixer(config.memory, ctx, project=False)
        self.retrieved_norm = ctx.norm(d, role="mixer.retrieved_norm")
        self.attention_norm = ctx.norm(d, role="mixer.attention_norm")
        self.memory_norm = ctx.norm(d, role="mixer.memory_norm")
        self.persistent = nn.Parameter(torch.empty(config.n_persistent, d)) if config.n_persistent else None
        self.position = ctx.position()
        self.position.for_heads(self.d_head)
        self.slopes = slopes_of(self.position, config.n_heads)

    def init_spec(self) -> dict[str, Init]:
        return {"persistent": normal(1.0)}

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        if seq.cu_seqlens is None:
            return self._documents(x)
        rows = DocumentRows(seq, x.shape[1])
        return rows.join(self._documents(rows.split(x)))

    def _documents(self, x: Tensor) -> Tensor:
        """x [B, T, D], one document per row from its start, segment by segment."""
        batch, length = x.shape[:2]
        core, form = self.memory.core, self.memory.core.form
        dtype = wide(x.dtype)
        state = MemoryState(tuple(w.expand(batch, *w.shape) for w in core.initial(dtype, x.device)))
        tail = None if self.memory.conv is None else self.memory.conv.new_tail(x)
        halo = form.window - 1
        past: tuple[Tensor, Tensor] | None = None
        outputs = []
        for start in range(0, length, self.chunk):
            part = x[:, start : start + self.chunk]
            n = part.shape[1]
            seq = SeqInfo.contiguous(batch, n, start=start, device=x.device)
            q, fresh = self._keys(part, state.memory, seq)
            a = self._attend(q, fresh, seq.positions)
            mq, mk, mv = self.memory._project(a, seq, tail)
            gates = self.memory.gates(a)
            with without_autocast(x.device):
                mq, mk = mq.to(dtype), mk.to(dtype)
                mv = core.targets(mk, mv)
                query, keys, values, heads = each_tensor((mq, mk, mv, gates), lambda t: t.transpose(1, 2))
                if past is None:
                    past = (keys[:, :, :1].new_zeros(*keys.shape[:2], halo, keys.shape[3]),) * 2
                keys, values = (torch.cat([old, new], dim=2) for old, new in zip(past, (keys, values)))
                real = torch.arange(start - halo, start + n, device=x.device) >= 0 if halo else None
                block = Block(query, keys, values, heads, None, None if real is None else real.expand(1, 1, -1))
                unfinished = torch.zeros(batch, dtype=torch.bool, device=x.device) if n < self.chunk else None
                y, state = run_block(form, core.outer(dtype), state, block, unfinished)
                assert y is not None
                past = keys[:, :, keys.shape[2] - halo :], values[:, :, values.shape[2] - halo :]
                y = y.transpose(1, 2)
                y = y + mq if core.config.residual else y
            outputs.append(self._join(a, self.memory._finish(a, y)))
        return torch.cat(outputs, dim=1)

    def _keys(self, x: Tensor, before: Weights, seq: SeqInfo) -> tuple[Tensor, Keys]:
        """Queries of tokens x [B, T, D], keys and values of these tokens and of what the memory `before` the segment
        recalls for them."""
        self.position.prepare(seq, torch.promote_types(x.dtype, torch.float32))
        recalled = self._recall(x, before)
        q, k, v = (y.unflatten(-1, (-1, self.d_head)) for y in project(x, self.q, self.k, self.v))
        k_recalled, v_recalled = (y.unflatten(-1, (-1, self.d_head)) for y in project(recalled, self.k, self.v))
        k, v = torch.cat([k, k_recalled], dim=2), torch.cat([v, v_recalled], dim=2)
        q, k = self.position.at_qk(q, k, seq)
        return q, Keys(k.to(q.dtype), v, seq.positions)

    def _recall(self, x: Tensor, weights: Weights) -> Tensor:
        """What a memory answers to x [B, T, D]."""
        core, memory = self.memory.core, self.memory
        q = F.silu(memory.q(x)).unflatten(-1, (memory.n_heads, -1))
        with without_autocast(x.device):
            q = q.to(wide(x.dtype))
            q = F.normalize(q, dim=-1, eps=1e-6) if memory.qk_norm else q
            outer = core.outer(q.dtype)
            y = recall(core.form, weights, outer.lift(q.transpose(1, 2)), outer.norm).transpose(1, 2)
            y = y + q if core.config.residual else y
        return self.retrieved_norm(y.flatten(2).to(x.dtype))

    def _attend(self, q: Tensor, keys: Keys, positions: Tensor) -> Tensor:
        """a [B, T, D] of queries [B, T, H, d] at `positions` over their own segment and the persistent tokens."""
        h, dtype = self.n_heads, wide(q.dtype)
        distance = positions[:, :, None] - keys.positions[:, None]
        segments = [p.div(self.chunk, rounding_mode="floor") for p in (positions, keys.positions)]
        seen = (distance >= 0) & (keys.positions >= 0)[:, None] & (segments[0][:, :, None] == segments[1][:, None])
        scores = []
        for k in keys.k.to(q.dtype).split(h, dim=2):
            own = torch.einsum("bthd,bshd->bhts", q, k).to(dtype) * self.d_head**-0.5
            if self.slopes is not None:
                slopes = torch.tensor(self.slopes, dtype=dtype, device=q.device)
                own = own - slopes[:, None, None] * distance[:, None]
            # Finite, as padding sees nothing, and its infinities would reach the memory.
            scores.append(own.masked_fill(~seen[:, None], torch.finfo(dtype).min))
        values = [*keys.v.to(q.dtype).split(h, dim=2)]
        if self.persistent is not None:
            k, v = (y.unflatten(-1, (h, -1)) for y in project(self.persistent.to(q.dtype), self.k, self.v))
            scores.append(torch.einsum("bthd,shd->bhts", q, k).to(dtype) * self.d_head**-0.5)
            values.append(v.to(q.dtype).expand(len(q), -1, -1, -1))
        weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(q.dtype)
        return torch.einsum("bhts,bshd->bthd", weights, torch.cat(values, dim=1)).flatten(2)

    def _join(self, near: Tensor, far: Tensor) -> Tensor:
        return self.out(self.attention_norm(near) * torch.sigmoid(self.memory_norm(far)))

    def prefill(self, x: Tensor, seq: SeqInfo, state: DecodeState) -> Tensor:
        assert isinstance(state, CompositeState)
        counts = valid_counts(seq)
        batch, length = x.shape[:2]
        places = (state["attention"].end() % self.chunk).tolist()
        left = [length] * batch if counts is None else counts.tolist()
        if len(set(places)) == 1 and counts is None:
            outputs, start = [], 0
            while start < length:
                part = slice(start, min(length, start + self.chunk - (places[0] if start == 0 else 0)))
                outputs.append(self._piece(x[:, part], SeqInfo(seq.positions[:, part]), state))
                start = part.stop
            return torch.cat(outputs, dim=1)
        y = torch.zeros_like(x)
        done = [0] * batch
        while any(left):
            taken = [min(n, self.chunk - place) for n, place in zip(left, places)]
            steps = torch.arange(max(taken), device=x.device)
            valid = steps < torch.tensor(taken, device=x.device)[:, None]
            index = (torch.tensor(done, device=x.device)[:, None] + steps).clamp(max=length - 1)
            own = SeqInfo(take_along(seq.positions, index), valid=valid)
            piece = self._piece(take_along(x, index), own, state)
            rows = torch.arange(batch, device=x.device)[:, None].expand_as(index)
            y = y.index_put((rows[valid], index[valid]), piece[valid])
            done, left = [a + n for a, n in zip(done, taken)], [a - n for a, n in zip(left, taken)]
            places = [(place + n) % self.chunk for place, n in zip(places, taken)]
        return y

    def _piece(self, x: Tensor, seq: SeqInfo, state: CompositeState) -> Tensor:
        """Tokens of which no row passes the end of a segment."""
        near, far = state["attention"], state["memory"]
        assert isinstance(near, WindowState) and isinstance(far, CompositeState)
        recurrent = far["memory"]
        assert isinstance(recurrent, RecurrentState)
        tensors, form = recurrent.read(), self.memory.core.form
        kept = "memory" if form.muon_block else "anchor"
        before = tuple(tensors[f"{kept}{i + 1}"] for i in range(form.n_weights))
        q, fresh = self._keys(x, before, seq)
        k, v, positions = near.append(fresh.k, fresh.v, valid_counts(seq))
        a = self._attend(q, Keys(k, v, positions), seq.positions)
        conv = far.parts.get("conv")
        assert conv is None or isinstance(conv, ConvState)
        mq, mk, mv = self.memory._project(a, seq, conv)
        y = self.memory.core.extend(mq, mk, mv, self.memory.gates(a), seq, recurrent)
        return self._join(a, self.memory._finish(a, y))

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        known: dict[str, Any] = {"n_tentative": n_tentative, "dtype": dtype, "device": device}
        attention = WindowState(batch, self.chunk, 2 * self.n_heads, self.d_head, **known)
        return CompositeState({"attention": attention, "memory": self.memory.new_state(batch, capacity, **known)})
