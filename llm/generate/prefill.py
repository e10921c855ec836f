"""Reading prompts into a decode state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.decoder import DecoderLike


class Prefill:
    """Reads right-padded prompts, `chunk` tokens at once (None: all).

    start: tokens of each prompt, or of every one, that the state has read already, fewer than it has. last [B, D]:
    hidden state of each row's last token, once `done`.
    """

    def __init__(
        self,
        model: DecoderLike,
        prompts: Sequence[Sequence[int]],
        state: DecodeState,
        chunk: int | None,
        start: int | Sequence[int] = 0,
    ) -> None:
        self.model, self.state = model, state
        device = state.length.device
        starts = [start] * len(prompts) if isinstance(start, int) else list(start)
        lengths = [len(prompt) - read for prompt, read in zip(prompts, starts, strict=True)]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : lengths[row]] = torch.as_tensor(prompt[starts[row] :])
        self.tokens = tokens.to(device)
        self.starts = torch.tensor(starts, device=device)
        self.ends = torch.tensor(lengths, device=device)
        self.ragged = min(lengths) < max(lengths)
        self.at = 0
        self.chunk = chunk or max(lengths)
        self.last: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether all prompts have been read."""
        return self.at >= self.tokens.shape[1]

    def read(self) -> None:
        """One chunk more."""
        assert not self.done
        part = self.tokens[:, self.at : self.at + self.chunk]
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
        longest = int(self.ends.max())
        self.tokens = self.tokens[index, :longest]
        self.ragged = int(self.ends.min()) < longest
        self.last = None if self.last is None else self.last[index]


def prefill(
    model: DecoderLike,
    prompts: Sequence[Sequence[int]],
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
