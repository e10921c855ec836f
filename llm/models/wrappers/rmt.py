"""Recurrent Memory Transformer: a few vectors go from segment to segment; with retrieval, all past ones can be read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from llm.core.cost import Cost
from llm.core.errors import UserError
from llm.core.init import Init
from llm.core.registry import About
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState, KVState
from llm.models.output import Output
from llm.models.wrappers.base import WRAPPERS, WrapperConfig
from llm.models.wrappers.recurrence import Recurrent, RecurrentConfig, SegmentCost
from llm.models.wrappers.segments import Carried, Closing, pick

if TYPE_CHECKING:
    from llm.models.config import ModelConfig


@WRAPPERS.register(
    "rmt",
    tiny=lambda: RMTConfig(n_memory=2, segment=5),
    tinies={
        "retrieval": lambda: RMTConfig(n_memory=2, segment=6, retrieval=True),
        "independent": lambda: RMTConfig(n_memory=0, segment=5),
        "checkpointed": lambda: RMTConfig(n_memory=3, segment=4, checkpoint_segments=True),
    },
    paper="arXiv:2207.06881; arXiv:2304.11062; with retrieval arXiv:2402.10790",
    status="experimental",
    about=About(
        equation="[_ ; H_s ; M_s] = f([M_{s−1} ; X_s ; M_{s−1}]), a segment X_s between two copies of its memory",
        use="Contexts of any length in constant memory, around any decoder; question answering over long texts.",
        weakness="Segments run one after another; what the few vectors drop is lost; training needs a curriculum.",
    ),
)
class RMTConfig(RecurrentConfig):
    """Recurrent Memory Transformer (RMT) and, with `retrieval`, RMT-R.

    retrieval: the inner model also reads n_memory vectors that attend to the memories of all past segments (one head);
    the state then grows by 2 n_memory vectors (their keys and values) per segment.
    """

    retrieval: bool = False

    @model_validator(mode="after")
    def _has_memory(self) -> RMTConfig:
        if self.retrieval and not self.n_memory:
            raise UserError("rmt: retrieval reads past memories; set n_memory to at least 1")
        return self

    def shape(self) -> tuple[int, int]:
        return self.n_memory * (2 if self.retrieval else 1), self.n_memory

    def wrap(self, inner: Any, model: ModelConfig) -> RMT:
        return RMT(self, inner, model)

    def added(self, model: ModelConfig, state_dtype_bytes: int, seq_len: int) -> tuple[Cost, SegmentCost]:
        m, d = self.n_memory, model.d_model
        params = Cost(params=m * d, active_params=m * d, state_bytes_per_seq=m * d * state_dtype_bytes)
        if not self.retrieval:
            return params, SegmentCost()
        linear = model.context(0).dims().linear
        projections = sum((linear(d, d, role=f"wrapper.{name}") for name in ("q", "k", "v", "out")), Cost())
        n_segments = -(-seq_len // (self.segment or seq_len))
        kept = m * d * (1 + 2 * n_segments) * state_dtype_bytes
        own = Cost(projections.params, projections.active_params, state_bytes_per_seq=kept)
        scores = 4.0 * m * d * m * (1 + n_segments) / 2
        each = m * projections.flops_per_token + scores
        return params + own, SegmentCost(close_first=each, close_later=each)

    @classmethod
    def identity(cls) -> WrapperConfig:
        return cls(n_memory=0)


class RMT(Recurrent):
    """memory [m, D]; q, k, v, out [D -> D] of the retrieval."""

    def __init__(self, config: RMTConfig, inner: Any, model: ModelConfig) -> None:
        super().__init__(config, inner, model)
        ctx = model.context(0)
        self.n_memory, self.d_model = config.n_memory, model.d_model
        self.memory = nn.Parameter(torch.empty(config.n_memory, model.d_model)) if config.n_memory else None
        self.memory_init = memory_init(model)
        self.retrieval = config.retrieval
        if config.retrieval:
            self.q, self.k, self.v, self.out = (
                ctx.linear(model.d_model, model.d_model, role=f"wrapper.{name}") for name in ("q", "k", "v", "out")
            )

    def init_spec(self) -> dict[str, Init]:
        return {"memory": self.memory_init}

    def start(self, batch: int, like: Tensor) -> Carried:
        if self.memory is None:
            return {}
        memory = self.memory.to(like.dtype).repeat(batch, 1, 1)
        if not self.retrieval:
            return {"memory": memory}
        keys, values = self.k(memory), self.v(memory)
        return {"memory": memory, "retrieved": self._retrieve(memory, keys, values), "keys": keys, "values": values}

    def lead(self, carried: Carried) -> Tensor | None:
        if self.memory is None:
            return None
        memory = carried["memory"]
        return torch.cat([memory, carried["retrieved"].to(memory.dtype)], dim=1) if self.retrieval else memory

    def tail(self, carried: Carried) -> Tensor | None:
        return carried["memory"] if self.memory is not None else None

    def read(
        self, x: Tensor, seq: SeqInfo, state: DecodeState | None, carried: Carried, first: Tensor | bool, at: Any
    ) -> tuple[Output, Any]:
        output = self.inner(x, seq, state=state)
        return output, None if at is None else pick(output.hidden, at)

    def close(self, carried: Carried, written: Any, first: Tensor | bool, closing: Closing | None) -> Carried:
        if self.memory is None:
            return {}
        if not self.retrieval:
            return {"memory": written}
        keys, values = self.k(written), self.v(written)
        if closing is None:
            keys, values = torch.cat([carried["keys"], keys], dim=1), torch.cat([carried["values"], values], dim=1)
            return {
                "memory": written,
                "retrieved": self._retrieve(written, keys, values),
                "keys": keys,
                "values": values,
            }
        log = closing.log
        assert isinstance(log, KVState)
        all_keys, all_values, positions = log.append(keys[:, :, None], values[:, :, None], self.n_memory * closing.rows)
        seen = positions < log.end()[:, None]
        keys, values = all_keys[:, :, 0].to(written.dtype), all_values[:, :, 0].to(written.dtype)
        return {"memory": written, "retrieved": self._retrieve(written, keys, values, seen)}

    def _retrieve(self, memory: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        """[B, m, D]: what the vectors of a memory [B, m, D] read from past ones, keys and values [B, P, D]."""
        scores = self.q(memory) @ keys.transpose(1, 2) / math.sqrt(self.d_model)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], float("-inf"))
        return self.out(torch.softmax(scores, dim=-1) @ values)

    def new_log(
        self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[DecodeState | None, int]:
        if not self.retrieval:
            return None, 0
        n_segments = -(-capacity // (self.settings.segment or capacity))
        log = KVState(batch, self.n_memory * n_segments, 1, self.d_model, dtype=dtype, device=device)
        begun = super().new_carried(batch, dtype=dtype, device=device)
        log.append(begun["keys"][:, :, None], begun["values"][:, :, None])
        return log, self.n_memory

    def new_carried(self, batch: int, *, dtype: torch.dtype, device: torch.device | str) -> Carried:
        begun = super().new_carried(batch, dtype=dtype, device=device)
        return {name: tensor for name, tensor in begun.items() if name in ("memory", "retrieved")}


def memory_init(model: ModelConfig) -> Init:
    """Memory starts as embeddings do, of the same standard deviation."""
    from llm.core.init import normal

    std = model.embed.std if model.embed.std is not None else model.init.std
    return normal((std if std is not None else model.d_model**-0.5) * model.embed.scale)
