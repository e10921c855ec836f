"""Reading a few tokens and telling what comes behind each, as it is or compiled."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.decoder import DecoderLike

MOST_GRAPHS = 32
"""Compiled forms of one model; two are usual, and a few more with drafts or where a cache has no room left to grow."""


def read_tokens(model: DecoderLike, tokens: Tensor, valid: Tensor | None, state: DecodeState) -> Tensor:
    """Logits [B, N, V] behind each of tokens [B, N], which the state reads."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    seq = SeqInfo(positions=state.end()[:, None] + steps, valid=valid)
    return model.head(model(tokens, seq, state=state).hidden)


class Step(Protocol):
    """Reads a few tokens. widths: numbers of tokens that it is made for; any other will do too."""

    widths: Sequence[int]

    def width(self, n: int) -> int:
        """How many tokens it reads best where n are wanted, those behind n being padding."""

    def __call__(self, tokens: Tensor, valid: Tensor | None, state: DecodeState) -> Tensor:
        """Logits [B, N, V] of `read_tokens`; only those of valid [B, N] tokens mean anything."""


class PlainStep:
    """`read_tokens` as it is."""

    widths: Sequence[int] = ()

    def __init__(self, model: DecoderLike) -> None:
        self.model = model

    def width(self, n: int) -> int:
        return n

    def __call__(self, tokens: Tensor, valid: Tensor | None, state: DecodeState) -> Tensor:
        return read_tokens(self.model, tokens, valid, state)


class CompiledStep:
    """`read_tokens`, compiled once for one row and once for several, for each of some numbers of tokens.

    n_drafts: so many drafted tokens are read behind the newest one; other numbers are padded to the next of these, or
    read without being compiled where there is none. The model must not change any more, nor the widths of a nested one.
    UserError when the compiler cannot hold the step in one graph, or would compile again and again.
    """

    def __init__(self, model: DecoderLike, n_drafts: Sequence[int] = (), *, backend: str = "inductor") -> None:
        self.model = model
        self.widths: Sequence[int] = sorted({1, *(n + 1 for n in n_drafts)})
        import torch._dynamo as dynamo

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MOST_GRAPHS)
        self._refusal = dynamo.exc.TorchDynamoException
        device = next(model.parameters()).device  # type: ignore[attr-defined]
        # An inference model does not change, and guards over all its parts cost as much as some layers.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        if backend == "inductor" and device.type == "cpu":
            options["cpp_wrapper"] = True

        def step(tokens: Tensor, valid: Tensor | None, state: DecodeState) -> Tensor:
            return read_tokens(model, tokens, valid, state)

        # The compiler keeps, searches and counts its graphs by code object: those of other models are not in the way.
        own = FunctionType(step.__code__.replace(), globals(), "step", None, step.__closure__)
        self._run = torch.compile(own, fullgraph=True, dynamic=True, backend=backend, options=options)

    def width(self, n: int) -> int:
        return next((width for width in self.widths if width >= n), n)

    def __call__(self, tokens: Tensor, valid: Tensor | None, state: DecodeState) -> Tensor:
        n = tokens.shape[1]
        if n not in self.widths:
            return read_tokens(self.model, tokens, valid, state)
        state.reserve(n)
        if valid is None and n > 1:
            # Whether all are real is not worth another graph.
            valid = torch.ones_like(tokens, dtype=torch.bool)
        try:
            return self._run(tokens, valid, state)
        except self._refusal as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"compile: the step of this model cannot be compiled; leave compile out ({reason})"
            ) from error
