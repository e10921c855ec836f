"""Parity: the logits of our model beside those that transformers computes from an exported folder."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.models.decoder import Decoder
from llm.models.wrappers.base import Wrapper

TOLERANCE = 1e-5
"""Largest difference of two logits over the largest logit, both models in fp32 with the written weights."""


@dataclass(frozen=True)
class Parity:
    """max_difference: largest difference of two logits. scale: largest logit. relative: their quotient.
    next_token_agreement: share of positions with the same likeliest token. rounding: the largest difference over the
    scale that rounding the weights to `dtype` made (None: they were not rounded)."""

    n_logits: int
    max_difference: float
    scale: float
    relative: float
    next_token_agreement: float
    rounding: float | None
    tolerance: float = TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check_tokens(vocab_size: int, max_seq_len: int, seed: int = 0) -> Tensor:
    """The fixed batch of a parity check, [2, T] int64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (2, min(max_seq_len, 256)), generator=rng)


@torch.no_grad()
def check_parity(ours: Decoder | Wrapper, folder: Path, *, full: Decoder | Wrapper | None = None) -> Parity:
    """Compare `ours` with the model in `folder`, both in fp32; UserError when they differ by more than TOLERANCE.

    full: our model before its weights were rounded, to state what the rounding did.
    """
    from transformers import AutoModelForCausalLM

    tokens = check_tokens(ours.config.required_vocab_size(), ours.config.max_seq_len)
    mine = logits_of(ours, tokens)
    try:
        theirs_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"export refused: transformers cannot load what was written ({reason}); nothing was kept"
        ) from error
    theirs = theirs_model.eval()(tokens).logits.float()
    rounding = None
    if full is not None:
        rounding = float((logits_of(full, tokens) - mine).abs().max()) / float(mine.abs().max())
    return compare(mine, theirs, rounding)


def compare(
    mine: Tensor, theirs: Tensor, rounding: float | None, what: str = "of the model reloaded by transformers"
) -> Parity:
    """How near two sets of logits are; UserError when they differ by more than TOLERANCE."""
    if theirs.shape != mine.shape:
        raise UserError(
            f"export refused: transformers gives logits of shape {list(theirs.shape)}, we {list(mine.shape)}; "
            "nothing was kept"
        )
    difference, scale = float((mine - theirs).abs().max()), float(mine.abs().max())
    relative = difference / scale if scale > 0 else difference
    parity = Parity(
        n_logits=mine.numel(),
        max_difference=difference,
        scale=scale,
        relative=relative,
        next_token_agreement=float((mine.argmax(-1) == theirs.argmax(-1)).float().mean()),
        rounding=rounding,
    )
    if not math.isfinite(relative) or relative > TOLERANCE:
        raise UserError(
            f"export refused: the logits {what} differ from ours by {difference:.3g} "
            f"(largest logit {scale:.3g}, allowed {TOLERANCE:g} of it); nothing was kept"
        )
    return parity


@torch.no_grad()
def logits_of(model: Decoder | Wrapper, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] in fp32."""
    return model.head(model(tokens, SeqInfo.contiguous(*tokens.shape)).hidden).float()


@torch.no_grad()
def stepped_logits_of(model: Decoder | Wrapper, tokens: Tensor, steps: int) -> Tensor:
    """Logits [B, T, V] in fp32 with a decode state, the last `steps` tokens read one by one.

    Some memories amplify rounding, so that these may differ more from `logits_of` than two right programs do.
    """
    batch, length = tokens.shape
    state = model.new_state(batch, length, dtype=torch.float32, device="cpu")
    first = max(1, length - steps)
    parts = []
    for chunk in (tokens[:, :first], *tokens[:, first:].split(1, dim=1)):
        seq = SeqInfo.contiguous(batch, chunk.shape[1], start=state.end())
        parts.append(model.head(model(chunk, seq, state=state).hidden).float())
    return torch.cat(parts, dim=1)
