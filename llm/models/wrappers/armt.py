"""Associative Recurrent Memory Transformer: in each layer a matrix memory, written once a segment by a delta rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from llm.blocks.base import BuildCtx
from llm.core.cost import Cost
from llm.core.init import Init
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.output import Output
from llm.models.wrappers.base import WRAPPERS, WrapperConfig, bare_decoder
from llm.models.wrappers.recurrence import Recurrent, RecurrentConfig, SegmentCost
from llm.models.wrappers.rmt import memory_init
from llm.models.wrappers.segments import Carried, Closing, pick

if TYPE_CHECKING:
    from llm.models.config import ModelConfig

EPS = 1e-5


@WRAPPERS.register(
    "armt",
    tiny=lambda: ARMTConfig(n_memory=2, segment=5, d_memory=4),
    tinies={
        "uncorrected": lambda: ARMTConfig(n_memory=3, segment=4, d_memory=3, nu=2, correction=False),
        "checkpointed": lambda: ARMTConfig(n_memory=2, segment=6, d_memory=4, nu=1, checkpoint_segments=True),
    },
    paper="arXiv:2407.04841",
    status="experimental",
    about=About(
        equation="x ← x + Aᵀφ(W_Q x) / zᵀφ(W_Q x) before each layer; A ← A + Σ β k(v − Aᵀk/zᵀk)ᵀ after each segment",
        use="Contexts of any length in constant memory with far more room than RMT's few vectors: facts by key.",
        weakness="Segments run one after another; recall of many pairs takes a long curriculum. What is recalled is "
        "divided by z · φ(q), which is near zero where φ(q) meets few keys, and amplifies rounding.",
    ),
)
class ARMTConfig(RecurrentConfig):
    """Associative Recurrent Memory Transformer (ARMT).

    d_memory: width of queries and keys before the feature map DPFP, which makes 2 * nu * d_memory of them.
    correction: the normaliser z takes of a key only what it does not hold yet (gamma), so that a value can be written
    over; without it, old and new values mix.
    """

    d_memory: int = Field(64, ge=1)
    nu: int = Field(3, ge=1)
    correction: bool = True

    def shape(self) -> tuple[int, int]:
        return 0, self.n_memory

    def wrap(self, inner: Any, model: ModelConfig) -> ARMT:
        return ARMT(self, bare_decoder(inner, "armt"), model)

    def added(self, model: ModelConfig, state_dtype_bytes: int, seq_len: int) -> tuple[Cost, SegmentCost]:
        m, d, d_key, n_layers = self.n_memory, model.d_model, 2 * self.nu * self.d_memory, model.n_layers
        tokens = Cost(params=m * d, active_params=m * d)
        each = Cost()
        layers = SegmentCost()
        for layer in range(n_layers):
            linear = model.context(layer).dims().linear
            q, k = (linear(d, self.d_memory, role=f"wrapper.{name}") for name in "qk")
            v, beta = linear(d, d, role="wrapper.v"), linear(d, 1, role="wrapper.beta", bias=True)
            recall = 2.0 * d_key * (d + 1)
            write = k.flops_per_token + v.flops_per_token + beta.flops_per_token + 2.0 * d_key * d
            layers = SegmentCost(
                read_later=layers.read_later + q.flops_per_token + recall,
                close_first=layers.close_first + m * write,
                close_later=layers.close_later + m * (write + recall),
            )
            each = each + q + k + v + beta
        state = n_layers * d_key * (d + 1) * max(4, state_dtype_bytes)
        return tokens + Cost(each.params, each.active_params, state_bytes_per_seq=state), layers

    @classmethod
    def identity(cls) -> WrapperConfig:
        return cls(n_memory=0)


class ARMT(Recurrent):
    """memory [m, D]; memories: an AssociativeMemory for each layer."""

    def __init__(self, config: ARMTConfig, inner: Any, model: ModelConfig) -> None:
        super().__init__(config, inner, model)
        self.memory = nn.Parameter(torch.empty(config.n_memory, model.d_model)) if config.n_memory else None
        self.memory_init = memory_init(model)
        self.memories = nn.ModuleList(
            AssociativeMemory(config, model.context(layer)) for layer in range(model.n_layers)
        )

    def init_spec(self) -> dict[str, Init]:
        return {"memory": self.memory_init}

    def start(self, batch: int, like: Tensor) -> Carried:
        carried: Carried = {}
        wide = torch.promote_types(like.dtype, torch.float32)
        for layer, memory in enumerate(self.memories):
            assert isinstance(memory, AssociativeMemory)
            carried[f"a{layer}"] = torch.zeros(batch, memory.d_key, memory.d_model, dtype=wide, device=like.device)
            carried[f"z{layer}"] = torch.zeros(batch, memory.d_key, dtype=wide, device=like.device)
        return carried

    def tail(self, carried: Carried) -> Tensor | None:
        return None if self.memory is None else self.memory.repeat(carried["z0"].shape[0], 1, 1)

    def read(
        self, x: Tensor, seq: SeqInfo, state: DecodeState | None, carried: Carried, first: Tensor | bool, at: Any
    ) -> tuple[Output, Any]:
        decoder = self.inner
        x = decoder.enter(x, seq)
        written = []
        for layer, memory in enumerate(self.memories):
            if first is not True:
                # An empty memory recalls zeros, so rows that are in their first segment need no mask.
                x = x + memory(x, carried[f"a{layer}"], carried[f"z{layer}"])
            x = decoder.run(x, seq, state, range(layer, layer + 1))
            if at is not None:
                written.append(pick(x, at))
        return Output(decoder.final_norm(x)), written

    def close(self, carried: Carried, written: Any, first: Tensor | bool, closing: Closing | None) -> Carried:
        if self.memory is None:
            return carried
        after: Carried = {}
        for layer, (memory, outputs) in enumerate(zip(self.memories, written, strict=True)):
            assert isinstance(memory, AssociativeMemory)
            a, z = memory.write(outputs, carried[f"a{layer}"], carried[f"z{layer}"], first)
            after |= {f"a{layer}": a, f"z{layer}": z}
        return after


class AssociativeMemory(nn.Module):
    """q, k [D -> d_memory], v [D -> D] (zero at the start), beta [D -> 1]. Its contents A [B, d_key, D] and z
    [B, d_key] are given and returned, never held: each row has its own, and a segment that is computed again for the
    backward pass does not write twice."""

    def __init__(self, config: ARMTConfig, ctx: BuildCtx) -> None:
        super().__init__()
        self.d_model, self.d_key = ctx.d_model, 2 * config.nu * config.d_memory
        self.nu, self.correction = config.nu, config.correction
        self.q = ctx.linear(ctx.d_model, config.d_memory, role="wrapper.q")
        self.k = ctx.linear(ctx.d_model, config.d_memory, role="wrapper.k")
        self.v = ctx.linear_config("wrapper.v").build(ctx.d_model, ctx.d_model, bias=False, std=0.0, init=ctx.init)
        self.beta = ctx.linear(ctx.d_model, 1, role="wrapper.beta", bias=True)

    def forward(self, x: Tensor, a: Tensor, z: Tensor) -> Tensor:
        """What every token of x [B, L, D] recalls, [B, L, D]."""
        queries = self.q(x).to(a.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return recall(dpfp(queries, self.nu), a, z).to(x.dtype)

    def write(self, m: Tensor, a: Tensor, z: Tensor, first: Tensor | bool) -> tuple[Tensor, Tensor]:
        """(A, z) after the layer's outputs m [B, m, D] at the memory tokens, all of which see the old A and z.

        first: where nothing has been written yet, for all rows or [B].
        """
        keys, values, beta = (part(m).to(a.dtype) for part in (self.k, self.v, self.beta))
        with torch.autocast(m.device.type, enabled=False):
            return delta_write(
                dpfp(keys, self.nu), values, torch.sigmoid(beta), a, z, first, correction=self.correction
            )


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021): [..., d] -> [..., 2 nu d], none below zero."""
    halves = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([halves * halves.roll(shift, dims=-1) for shift in range(1, nu + 1)], dim=-1)


def recall(keys: Tensor, a: Tensor, z: Tensor) -> Tensor:
    """Values [B, L, D] at keys [B, L, d_key]: A^T k / (z . k)."""
    return keys @ a / (keys @ z[..., None] + EPS)


def delta_write(
    keys: Tensor, values: Tensor, beta: Tensor, a: Tensor, z: Tensor, first: Tensor | bool, *, correction: bool = True
) -> tuple[Tensor, Tensor]:
    """(A, z) after writing values [B, m, D] at keys [B, m, d_key] with strengths beta [B, m, 1], all at once.

    A += sum of beta k (v - recalled v)^T; z += sum of gamma k, with gamma the part of a key that z does not hold yet.
    """
    old: Tensor | float = 0.0
    share = torch.ones_like(beta)
    if first is not True:
        old = recall(keys, a, z)
        if correction:
            norm = keys.square().sum(dim=-1, keepdim=True)
            share = (1 - (keys @ z[..., None] + EPS) / (norm + EPS)).clamp(0, 1).detach()
            if isinstance(first, Tensor):
                share = torch.where(first[:, None, None], 1.0, share)
    return a + keys.transpose(1, 2) @ (beta * (values - old)), z + (share * keys).sum(dim=1)
