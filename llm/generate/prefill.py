"""Reading prompts into a decode state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.decoder import DecoderLike


def prefill(
    model: DecoderLike, prompts: Sequence[Sequence[int]], state: DecodeState, chunk: int | None, start: int = 0
) -> Tensor:
    """Read right-padded prompts, `chunk` tokens at once (None: all); hidden [B, D] of each row's last token.

    start: tokens of every prompt that the state has read already, less than the shortest has.
    """
    device = state.length.device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    chunk = chunk or longest
    ragged = min(lengths) < longest
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = torch.as_tensor(prompt)
    tokens = tokens.to(device)
    ends = torch.tensor(lengths, device=device)
    last: Tensor | None = None
    for first in range(start, longest, chunk):
        part = tokens[:, first : first + chunk]
        positions = torch.arange(first, first + part.shape[1], device=device).expand(len(prompts), -1)
        valid = positions < ends[:, None] if ragged else None
        hidden = model(part, SeqInfo(positions=positions, valid=valid), state=state).hidden
        at = ends - 1 - first
        inside = (at >= 0) & (at < part.shape[1])
        here = hidden[torch.arange(len(prompts), device=device), at.clamp(0, part.shape[1] - 1)]
        last = here if last is None else torch.where(inside[:, None], here, last)
    assert last is not None
    return last
