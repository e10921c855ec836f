"""Perplexity and bits per byte of a model on documents, with a sliding window so that every token has context.

Each document is scored by itself: its tokens and the end-of-text token that closes it, the first one predicted from the
token that starts documents (bos where the tokenizer has one, else eos). Every token is scored exactly once. Bits per
byte are all these bits over the raw UTF-8 bytes of the documents.

Shapes: N tokens of a document, windows of at most L.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.core.batch import IGNORE
from llm.core.seq import SeqInfo
from llm.models.decoder import DecoderLike

HEAD_CHUNK = 2048
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Document:
    """ids: tokens with the closing eos, [N]. n_bytes: raw UTF-8 bytes of its text."""

    ids: np.ndarray
    n_bytes: int


@dataclass(frozen=True)
class Window:
    """Tokens start..end of a document; those from `first` on are scored here, the others are context."""

    document: int
    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Score:
    """loss: nats per token. bits_per_byte: all bits over all bytes. context, stride: of the sliding window."""

    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float
    n_documents: int
    n_tokens: int
    n_bytes: int
    context: int
    stride: int
    precision: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def windows_of(n_tokens: int, context: int, stride: int, document: int = 0) -> list[Window]:
    """Windows that together score tokens 0..n_tokens, each once. All but the first have at least context - stride
    tokens of context, and begin where they are full."""
    if n_tokens == 0:
        return []
    windows = [Window(document, 0, 0, min(context, n_tokens))]
    while windows[-1].end < n_tokens:
        scored = windows[-1].end
        end = min(scored + stride, n_tokens)
        windows.append(Window(document, max(0, end - context), scored, end))
    return windows


def batches_of(windows: Iterable[Window], batch_tokens: int) -> list[list[Window]]:
    """Windows of like length together, at most `batch_tokens` tokens with padding, longest first."""
    batches: list[list[Window]] = []
    longest = 0
    for window in sorted(windows, key=lambda w: w.start - w.end):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = window.end - window.start
        batches[-1].append(window)
    return batches


def evaluate_documents(
    model: DecoderLike,
    documents: Sequence[Document],
    start_id: int,
    *,
    context: int | None = None,
    stride: int | Literal["half", "full"] = "half",
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_tokens: int = 16384,
    n_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score documents. context: window length (None: the model's max_seq_len). n_bytes: of all documents, where the sum
    of theirs is not exact. progress: called with (scored, all) tokens."""
    began = time.perf_counter()
    length = context or model.config.max_seq_len
    step = {"half": max(1, length // 2), "full": length}[stride] if isinstance(stride, str) else stride
    assert 1 <= step <= length
    windows = [w for i, doc in enumerate(documents) for w in windows_of(len(doc.ids), length, step, i)]
    n_tokens = sum(len(doc.ids) for doc in documents)
    device = next(model.parameters()).device  # type: ignore[attr-defined]
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    nats = 0.0
    scored = 0
    with torch.inference_mode(), autocast:
        for batch in batches_of(windows, batch_tokens):
            tokens, labels = _tensors(batch, documents, start_id)
            total, count = _batch_loss(model, tokens.to(device), labels.to(device))
            nats += total
            scored += count
            if progress is not None:
                progress(scored, n_tokens)
    assert scored == n_tokens, (scored, n_tokens)
    n_bytes = sum(doc.n_bytes for doc in documents) if n_bytes is None else n_bytes
    bits = nats / math.log(2)
    loss = nats / max(1, n_tokens)
    return Score(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_token=bits / max(1, n_tokens),
        bits_per_byte=bits / max(1, n_bytes),
        n_documents=len(documents),
        n_tokens=n_tokens,
        n_bytes=n_bytes,
        context=length,
        stride=step,
        precision=precision,
        seconds=time.perf_counter() - began,
    )


def _tensors(batch: list[Window], documents: Sequence[Document], start_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, T] int64 of windows, padded on the right; what is not scored has the label IGNORE."""
    longest = max(w.end - w.start for w in batch)
    tokens = np.full((len(batch), longest), start_id, dtype=np.int64)
    labels = np.full((len(batch), longest), IGNORE, dtype=np.int64)
    for row, w in enumerate(batch):
        ids = documents[w.document].ids
        tokens[row, 0] = ids[w.start - 1] if w.start else start_id
        tokens[row, 1 : w.end - w.start] = ids[w.start : w.end - 1]
        labels[row, w.first - w.start : w.end - w.start] = ids[w.first : w.end]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def _batch_loss(model: DecoderLike, tokens: Tensor, labels: Tensor) -> tuple[float, int]:
    """(summed nats, number of scored tokens)."""
    seq = SeqInfo.contiguous(*tokens.shape, device=tokens.device)
    wanted = labels != IGNORE
    hidden, targets = model(tokens, seq).hidden[wanted], labels[wanted]
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for h, t in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        total += F.cross_entropy(model.head(h).float(), t, reduction="sum").double()
    return float(total), len(targets)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, compresslevel=9, mtime=0),
    "bz2 -9": lambda data: bz2.compress(data, compresslevel=9),
    "xz -9": lambda data: lzma.compress(data, preset=9),
}


def compressors_bits_per_byte(data: bytes) -> dict[str, float]:
    """Bits per byte that general compressors need for `data` as one stream."""
    return {name: 8 * len(compress(data)) / max(1, len(data)) for name, compress in COMPRESSORS.items()}
