"""The socket of wrappers: a model around a model, which has all that a decoder has, so that wrappers nest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llm.blocks.base import Caps
from llm.config.base import Tagged
from llm.core.cost import Mode
from llm.core.errors import UserError
from llm.core.init import init_specs
from llm.core.registry import Registry
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState

if TYPE_CHECKING:
    from llm.models.config import ModelConfig, ModelCost
    from llm.models.decoder import Decoder
    from llm.models.output import Output

WRAPPERS: Registry[WrapperConfig] = Registry("wrapper")

CostOf = Callable[[int, Mode], "ModelCost"]
"""(seq_len, mode) -> cost of a model, so that a wrapper can ask what is inside at other lengths than its own."""


class WrapperConfig(Tagged):
    """Config of a wrapper."""

    registry = WRAPPERS

    def wrap(self, inner: Any, model: ModelConfig) -> Wrapper:
        """The wrapped model; UserError where this wrapper cannot stand around `inner` (a DecoderLike)."""
        raise NotImplementedError

    def cost(self, inner: CostOf, model: ModelConfig, seq_len: int, mode: Mode, *, state_dtype_bytes: int) -> ModelCost:
        """Cost of the wrapped model, given that of what is inside; what the wrapper adds goes into `wrappers`."""
        raise NotImplementedError

    def restarts_positions(self) -> bool:
        """Whether positions begin anew within a sequence, so that model.max_seq_len does not bound its length."""
        return False

    @classmethod
    def identity(cls) -> WrapperConfig | None:
        """The setting under which the wrapped model equals the bare one to the last bit (one loop, one segment without
        memory, full width); None where the method has no such setting, which its registry entry must explain."""
        return None


def bare_decoder(inner: Any, wrapper: str) -> Decoder:
    """`inner`, for a wrapper that reaches into a decoder's layers; UserError where another wrapper is around it."""
    from llm.models.decoder import Decoder

    if not isinstance(inner, Decoder):
        raise UserError(
            f"{wrapper} reaches into the layers of a bare decoder, and a {type(inner).__name__} is around it already; "
            f"list {wrapper} first in model.wrappers"
        )
    return inner


class Wrapper(nn.Module):
    """A model around `inner`: whatever it does not change, it passes on.

    A wrapper changes `forward` and `new_state`. Parameters of the inner model keep their dotted names, so that they
    start with the same values and are read from checkpoints of the bare model.
    """

    caps: ClassVar[Caps] = Caps()

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._wrapped_model = inner

    @property
    def inner(self) -> Any:
        """The model inside, a DecoderLike."""
        return self._wrapped_model

    @property
    def config(self) -> ModelConfig:
        """The config of the whole model."""
        return self.inner.config

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, T, D] of ids [B, T]."""
        return self.inner.embed(tokens)

    def forward(self, tokens: Tensor, seq: SeqInfo, *, state: DecodeState | None = None, carry: Any = None) -> Output:
        """As the decoder's."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.inner.head(hidden)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, *, z_loss: float = 0.0, chunk: int | None = None) -> Any:
        """Loss of hidden [N, D] against labels [N]."""
        return self.inner.cross_entropy(hidden, labels, z_loss=z_loss, chunk=chunk)

    def new_state(
        self, batch: int, capacity: int, *, n_tentative: int = 0, dtype: torch.dtype, device: torch.device | str
    ) -> DecodeState:
        """An empty decode state."""
        return self.inner.new_state(batch, capacity, n_tentative=n_tentative, dtype=dtype, device=device)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(dotted name, block) in order."""
        for name, block in self.inner.blocks():
            yield f"_wrapped_model.{name}", block

    def tie(self) -> None:
        """Tie embedding and head of the inner model again."""
        self.inner.tie()

    def is_tied(self) -> bool:
        """Whether embedding and head share storage now."""
        return self.inner.is_tied()

    def init_names(self) -> list[str]:
        """Names of all parameters and buffers, each once."""
        return list(dict.fromkeys(name for name, _, _ in init_specs(self)))

    def added_names(self) -> set[str]:
        """Names of what this wrapper and those inside it add to the decoder: a checkpoint of the decoder has none of
        it."""
        inside: set[str] = self.inner.added_names() if isinstance(self.inner, Wrapper) else set()
        return inside | (set(self.init_names()) - set(self.inner.init_names()))
