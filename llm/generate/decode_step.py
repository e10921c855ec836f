"""One step of plain decoding, as it is or compiled."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.decoder import DecoderLike

Step = Callable[[Tensor, DecodeState], Tensor]
"""(newest token of each row [B], state, which reads it) -> logits [B, V]."""

MOST_GRAPHS = 24
"""Compiled forms of one model; two are usual, and one more where a cache has no room left to grow."""


def read_one(model: DecoderLike, tokens: Tensor, state: DecodeState) -> Tensor:
    """Logits [B, V] behind tokens [B], which the state reads."""
    seq = SeqInfo(positions=state.end()[:, None])
    return model.head(model(tokens[:, None], seq, state=state).hidden[:, -1])


class CompiledStep:
    """`read_one`, compiled once for one row and once for several, whatever their length.

    The model must not change any more, nor the widths of a nested one. UserError when the compiler cannot hold the step
    in one graph, or would compile again and again.
    """

    def __init__(self, model: DecoderLike, *, backend: str = "inductor") -> None:
        import torch._dynamo as dynamo

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MOST_GRAPHS)
        self._refusal = dynamo.exc.TorchDynamoException
        device = next(model.parameters()).device  # type: ignore[attr-defined]
        # An inference model does not change, and guards over all its parts cost as much as some layers.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        if backend == "inductor" and device.type == "cpu":
            options["cpp_wrapper"] = True

        def step(tokens: Tensor, state: DecodeState) -> Tensor:
            return read_one(model, tokens, state)

        # The compiler keeps, searches and counts its graphs by code object: those of other models are not in the way.
        own = FunctionType(step.__code__.replace(), globals(), "step", None, step.__closure__)
        self._run = torch.compile(own, fullgraph=True, dynamic=True, backend=backend, options=options)

    def __call__(self, tokens: Tensor, state: DecodeState) -> Tensor:
        state.reserve(1)
        try:
            return self._run(tokens, state)
        except self._refusal as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"compile: the step of this model cannot be compiled; leave compile out ({reason})"
            ) from error
