"""Perplexity: every token once, with enough context, and the figures are those of a plain computation."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from evals.perplexity import (
    Document,
    batches_of,
    compressors_bits_per_byte,
    evaluate_documents,
    windows_of,
)
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.decoder import Decoder

START = 30


@pytest.fixture(scope="module")
def model() -> Decoder:
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu", "d_hidden": 24}}
    config = ModelConfig(
        vocab_size=31, d_model=16, max_seq_len=16, layers=[{"pattern": [block], "repeat": 2}], init={"std": 0.4}
    )
    built = config.build("cpu")
    initialise(built, 0)
    return built.eval()


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(rng.integers(0, 30, n), 3 * n) for n in (1, 5, 16, 17, 40, 100, 0, 33)]


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_score_every_token_once(n_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = windows_of(n_tokens, context, stride)
    assert [t for w in windows for t in range(w.first, w.end)] == list(range(n_tokens))
    for number, w in enumerate(windows):
        assert 0 <= w.start <= w.first < w.end <= w.start + context
        assert number == 0 or w.first - w.start >= context - stride
        assert number == 0 or w.end - w.start == context


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 64))
def test_batches_hold_every_window_within_the_budget(lengths: list[int], batch_tokens: int) -> None:
    windows = [w for i, n in enumerate(lengths) for w in windows_of(n, 20, 10, i)]
    batches = batches_of(windows, batch_tokens)
    assert sorted(w.document for batch in batches for w in batch) == sorted(w.document for w in windows)
    for batch in batches:
        longest = max(w.end - w.start for w in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens


def plain(model: Decoder, documents: list[Document], context: int, stride: int) -> float:
    """Nats, one window at a time."""
    nats = 0.0
    for doc in documents:
        whole = torch.tensor([START, *doc.ids.tolist()])
        done = 0
        while done < len(doc.ids):
            end = min(len(doc.ids), context if done == 0 else done + stride)
            start = max(0, end - context)
            tokens = whole[None, start:end]
            logits = model.head(model(tokens, SeqInfo.contiguous(*tokens.shape)).hidden)[0]
            nats += float(F.cross_entropy(logits[done - start :], whole[done + 1 : end + 1], reduction="sum"))
            done = end
    return nats


@pytest.mark.parametrize(("stride", "steps"), [("half", 8), ("full", 16), (3, 3)])
@pytest.mark.parametrize("batch_tokens", [1, 64, 10000])
@torch.no_grad()
def test_equals_a_plain_computation(
    model: Decoder, documents: list[Document], stride: int | str, steps: int, batch_tokens: int
) -> None:
    score = evaluate_documents(model, documents, START, stride=stride, batch_tokens=batch_tokens)  # type: ignore[arg-type]
    nats = plain(model, documents, 16, steps)
    assert score.n_tokens == sum(len(d.ids) for d in documents)
    assert score.loss * score.n_tokens == pytest.approx(nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / sum(d.n_bytes for d in documents), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / score.n_tokens), rel=1e-5)
    assert score.bits_per_token == pytest.approx(score.loss / math.log(2))


def test_bf16_is_near_fp32(model: Decoder, documents: list[Document]) -> None:
    full = evaluate_documents(model, documents, START)
    half = evaluate_documents(model, documents, START, precision="bf16")
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.loss != full.loss


def test_more_context_is_used(model: Decoder) -> None:
    """The result must depend on tokens before the window's scored part, else stride would mean nothing."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 30, 64)
    short = evaluate_documents(model, [Document(ids, 64)], START, stride="full")
    long = evaluate_documents(model, [Document(ids, 64)], START, stride=1)
    assert short.loss != long.loss


def test_progress_ends_at_all_tokens(model: Decoder, documents: list[Document]) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_documents(
        model, documents, START, batch_tokens=32, progress=lambda done, total: seen.append((done, total))
    )
    n_tokens = sum(len(d.ids) for d in documents)
    assert seen[-1] == (n_tokens, n_tokens)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_compressors_are_the_standard_ones() -> None:
    data = b"the quick brown fox " * 500
    found = compressors_bits_per_byte(data)
    assert found["gzip -9"] == 8 * len(gzip.compress(data, 9)) / len(data)
    assert found["bz2 -9"] == 8 * len(bz2.compress(data, 9)) / len(data)
    assert found["xz -9"] == 8 * len(lzma.compress(data, preset=9)) / len(data)
