"""Logits of a prompt read in any chunks, at once, or token by token are the same, for every mixer and wrapper."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.core.registry import Entry
from llm.core.seq import SeqInfo
from tests.contracts.checks.harness import VOCAB, assert_same
from tests.contracts.test_speculative import CASES, build, parameters

N_ROWS, N_TOKENS, TOLERANCE = 2, 29, 1e-5

AMPLIFIES_ROUNDING = {
    "test_time_memory-muon_matrix": "Newton-Schulz raises singular values near rounding to the size of the largest.",
    "armt-uncorrected": "What is recalled is divided by z · φ(q), which is near zero where φ(q) meets few of the keys.",
}
"""Variants whose equality shows in fp64 alone; in fp32 they may be ten times further apart."""


@torch.no_grad()
def logits(model: Any, tokens: Tensor, splits: list[int]) -> Tensor:
    """[B, T, V] of tokens [B, T] read in chunks of these sizes."""
    dtype = next(model.parameters()).dtype
    state = model.new_state(len(tokens), tokens.shape[1], dtype=dtype, device="cpu")
    parts = []
    for part in tokens.split(splits, dim=1):
        seq = SeqInfo.contiguous(len(part), part.shape[1], start=state.end())
        parts.append(model.head(model(part, seq, state=state).hidden))
    assert state.end().tolist() == [tokens.shape[1]] * len(tokens)
    return torch.cat(parts, dim=1)


def random_splits(rng: random.Random, n: int) -> list[int]:
    """Sizes that add up to n, every cut as likely as the other."""
    cuts = [0, *(at for at in range(1, n) if rng.random() < rng.choice((0.1, 0.5))), n]
    return [b - a for a, b in zip(cuts, cuts[1:])]


def check(model: Any, label: str, splits: list[list[int]]) -> None:
    if label in AMPLIFIES_ROUNDING:
        check_in(model.double(), splits, 1e-10)
        check_in(model.float(), splits, 10 * TOLERANCE)
    else:
        check_in(model.float(), splits, TOLERANCE)


def check_in(model: Any, splits: list[list[int]], tolerance: float) -> None:
    tokens = torch.randint(VOCAB, (N_ROWS, N_TOKENS), generator=torch.Generator().manual_seed(0))
    at_once = logits(model, tokens, [N_TOKENS])
    for split in splits:
        assert_same(logits(model, tokens, split), at_once, f"chunks of {split} against one", tolerance)


def two(n: int) -> list[list[int]]:
    return [[first, n - first] for first in range(1, n)]


@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] == c[2].name]))
def test_any_chunks(kind: str, label: str, entry: Entry[Any]) -> None:
    rng = random.Random(label)
    check(build(kind, label, entry), label, [[1] * N_TOKENS, *(random_splits(rng, N_TOKENS) for _ in range(4))])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "label", "entry"), parameters(CASES))
def test_every_split_in_two_and_many_chunks(kind: str, label: str, entry: Entry[Any]) -> None:
    rng = random.Random(label)
    splits = [[1] * N_TOKENS, *two(N_TOKENS), *(random_splits(rng, N_TOKENS) for _ in range(20))]
    check(build(kind, label, entry), label, splits)
