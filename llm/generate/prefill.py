"""Reading prompts into a decode state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.core.seq import SeqInfo
from llm.core.state import DecodeState
from llm.models.decoder import DecoderLike


def prefill(model: DecoderLike, prompts: Sequence[Sequence[int]], state: DecodeState, chunk: int | None) -> Tensor:
    """Read right-padded prompts, `chunk` tokens at once (None: all); hidden [B, D] of each row's last token."""
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
    for start in range(0, longest, chunk):
        part = tokens[:, start : start + chunk]
        positions = torch.arange(start, start + part.shape[1], device=device).expand(len(prompts), -1)
        valid = positions < ends[:, None] if ragged else None
        hidden = model(part, SeqInfo(positions=positions, valid=valid), state=state).hidden
        at = ends - 1 - start
        inside = (at >= 0) & (at < part.shape[1])
        here = hidden[torch.arange(len(prompts), device=device), at.clamp(0, part.shape[1] - 1)]
        last = here if last is None else torch.where(inside[:, None], here, last)
    assert last is not None
    return last
