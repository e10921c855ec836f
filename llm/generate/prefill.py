"""Reading prompts into a decode state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.decoder import DecoderLike


class PromptStream:
    """A prompt of `length` tokens that is never held whole. parts: called when reading begins; gives arrays of token
    ids, of any sizes, that are the prompt one after another."""

    def __init__(self, length: int, parts: Callable[[], Iterable[Sequence[int] | np.ndarray]]) -> None:
        self.length, self.parts = length, parts

    def __len__(self) -> int:
        return self.length


Prompt: TypeAlias = Sequence[int] | PromptStream


class Prefill:
    """Reads right-padded prompts, `chunk` tokens at once (None: all).

    start: tokens of each prompt, or of every one, that the state has read already, fewer than it has; 0 where one is a
    stream. last [B, D]: hidden state of each row's last token, once `done`.
    """

    def __init__(
        self,
        model: DecoderLike,
        prompts: Sequence[Prompt],
        state: DecodeState,
        chunk: int | None,
        start: int | Sequence[int] = 0,
    ) -> None:
        self.model, self.state = model, state
        device = state.length.device
        starts = [start] * len(prompts) if isinstance(start, int) else list(start)
        lengths = [len(prompt) - read for prompt, read in zip(prompts, starts, strict=True)]
        self.streams: list[_Reading] | None = None
        self.tokens = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
        if any(isinstance(prompt, PromptStream) for prompt in prompts):
            assert not any(starts)
            self.streams = [_Reading(prompt, model.config.required_vocab_size()) for prompt in prompts]
        else:
            tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
            for row, prompt in enumerate(prompts):
                assert not isinstance(prompt, PromptStream)
                tokens[row, : lengths[row]] = torch.as_tensor(prompt[starts[row] :])
            self.tokens = tokens.to(device)
        self.starts = torch.tensor(starts, device=device)
        self.ends = torch.tensor(lengths, device=device)
        self.longest = max(lengths)
        self.ragged = min(lengths) < max(lengths)
        self.at = 0
        self.chunk = chunk or max(lengths)
        self.last: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether all prompts have been read."""
        return self.at >= self.longest

    def read(self) -> None:
        """One chunk more."""
        assert not self.done
        part = self._part(min(self.chunk, self.longest - self.at))
        n_rows, n = part.shape
        places = torch.arange(self.at, self.at + n, device=part.device).expand(n_rows, -1)
        valid = places < self.ends[:, None] if self.ragged else None
        seq = SeqInfo(positions=self.starts[:, None] + places, valid=valid)
        hidden = self.model(part, seq, state=self.state).hidden
        at = self.ends - 1 - self.at
        inside = (at >= 0) & (at < n)
        here = hidden[torch.arange(n_rows, device=part.device), at.clamp(0, n - 1)]
        self.last = here if self.last is None else torch.where(inside[:, None], here, self.last)
        self.at += n

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order, of which there is at least one; the state's too."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.ends.device)
        self.state.reorder(index)
        self.starts, self.ends = self.starts[index], self.ends[index]
        self.longest = int(self.ends.max())
        if self.streams is not None:
            self.streams = [self.streams[row] for row in rows]
        else:
            self.tokens = self.tokens[index, : self.longest]
        self.ragged = int(self.ends.min()) < self.longest
        self.last = None if self.last is None else self.last[index]

    def _part(self, n: int) -> Tensor:
        """The next tokens [B, n], 0 behind the ends."""
        if self.streams is None:
            return self.tokens[:, self.at : self.at + n]
        part = torch.zeros(len(self.streams), n, dtype=torch.int64)
        for row, (stream, end) in enumerate(zip(self.streams, self.ends.tolist(), strict=True)):
            n_own = min(n, max(0, end - self.at))
            part[row, :n_own] = torch.from_numpy(stream.take(n_own))
        return part.to(self.ends.device)


class _Reading:
    """A prompt while it is read, from front to back."""

    def __init__(self, prompt: Prompt, vocab_size: int) -> None:
        parts = prompt.parts() if isinstance(prompt, PromptStream) else [prompt]
        self._parts: Iterator[Sequence[int] | np.ndarray] = iter(parts)
        self._vocab_size = vocab_size
        self._held = np.zeros(0, dtype=np.int64)

    def take(self, n: int) -> np.ndarray:
        """The next n ids, int64."""
        held, n_held = [self._held], len(self._held)
        while n_held < n:
            part = np.asarray(next(self._parts), dtype=np.int64)
            if len(part) and not 0 <= part.min() <= part.max() < self._vocab_size:
                raise UserError(
                    f"a prompt holds token ids {part.min()} to {part.max()}; the model's are 0 to "
                    f"{self._vocab_size - 1}: is this the tokenizer that the model was trained with?"
                )
            held.append(part)
            n_held += len(part)
        joined = np.concatenate(held)
        self._held = joined[n:]
        return joined[:n]


def prefill(
    model: DecoderLike,
    prompts: Sequence[Prompt],
    state: DecodeState,
    chunk: int | None,
    start: int | Sequence[int] = 0,
) -> Tensor:
    """Read all of the prompts; hidden [B, D] of each row's last token. Arguments as of `Prefill`."""
    reading = Prefill(model, prompts, state, chunk, start)
    while not reading.done:
        reading.read()
    assert reading.last is not None
    return reading.last
