"""Any parts that fit together build, train one step, count right and decode, on a CPU.

All triples mixer x channel x linear are tried, and all pairs of parts of any two kinds. Parts that do not fit say so
with a UserError when the model is built; each part must fit most of the others.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from llm.blocks.base import CHANNELS, LINEARS, MIXERS, NORMS, POSITIONS, RESIDUALS
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from tests.contracts.checks.harness import VOCAB, assert_same, fill, n_parameters, tiny_model
from tests.contracts.examples import EXAMPLES

KINDS = ("mixer", "channel", "linear", "residual", "norm", "position")
MAX_TRIPLES = 400
"""Above this many, only the main variant of each channel and linear enters the triples; pairs still take them all."""


def _variants(registries: list[Any], *, main_only: bool = False) -> dict[str, Any]:
    return {
        label: make
        for registry in registries
        for entry in registry.entries()
        for label, make in (entry.variants() if not main_only else {entry.name: entry.tiny}).items()
    }


PARTS: dict[str, dict[str, Any]] = {
    "mixer": _variants([MIXERS, EXAMPLES]),
    "channel": _variants([CHANNELS]),
    "linear": _variants([LINEARS]),
    "residual": _variants([RESIDUALS]),
    "norm": _variants([NORMS]),
    "position": _variants([POSITIONS]),
}


def combinations() -> list[tuple[str, ...]]:
    """One label per kind: all triples of the first three kinds, the rest chosen to cover as many new pairs as it can;
    then further rows until every pair is covered."""
    first = [list(PARTS[kind]) for kind in KINDS[:3]]
    if len(first[0]) * len(first[1]) * len(first[2]) > MAX_TRIPLES:
        first[1] = list(_variants([CHANNELS], main_only=True))
        first[2] = list(_variants([LINEARS], main_only=True))
    left = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(KINDS)), 2)
        for a in PARTS[KINDS[i]]
        for b in PARTS[KINDS[j]]
    }
    rows = []
    for triple in itertools.product(*first):
        rows.append(_complete(dict(enumerate(triple)), left))
    while left:
        i, a, j, b = min(left)
        rows.append(_complete({i: a, j: b}, left))
    return rows


def _complete(row: dict[int, str], left: set[tuple[int, str, int, str]]) -> tuple[str, ...]:
    for kind in range(len(KINDS)):
        if kind not in row:
            row[kind] = max(PARTS[KINDS[kind]], key=lambda label: len(_pairs(row | {kind: label}) & left))
    left -= _pairs(row)
    return tuple(row[kind] for kind in range(len(KINDS)))


def _pairs(row: dict[int, str]) -> set[tuple[int, str, int, str]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(sorted(row), 2)}


COMBINATIONS = combinations()


def _model(labels: tuple[str, ...]) -> Any:
    parts = {kind: PARTS[kind][label]() for kind, label in zip(KINDS, labels)}
    linear = {"*": parts.pop("linear")}
    return tiny_model(parts.pop("mixer"), parts.pop("channel"), n_layers=1, linear=linear, **parts)


def _build(labels: tuple[str, ...], device: str) -> Any:
    config = _model(labels)
    return config, config.build(device)


@pytest.mark.parametrize("labels", COMBINATIONS, ids="-".join)
def test_parts_work_together(labels: tuple[str, ...]) -> None:
    try:
        config, model = _build(labels, "cpu")
    except UserError as refusal:
        pytest.skip(f"declared not to fit: {refusal}")
    cost = config.cost(8).total
    assert cost.params == n_parameters(model)
    initialise(model, 0)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        hidden = model(tokens[:, :-1], SeqInfo.from_lengths([[8], [3, 5]], 8)).hidden
        loss = torch.nn.functional.cross_entropy(model.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0], f"a step raised the loss from {losses[0]} to {losses[1]}"
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert not idle, f"{idle} got no gradient"
    _check_decoding(model, tokens[:, :8])


@torch.no_grad()
def _check_decoding(model: Any, tokens: torch.Tensor) -> None:
    fill(model).eval()
    whole = model.head(model(tokens, SeqInfo.contiguous(2, 8)).hidden)
    state = model.new_state(2, 8, n_tentative=2, dtype=torch.float64, device="cpu")
    parts = []
    for start, length in ((0, 5), (5, 1)):
        seq = SeqInfo.contiguous(2, length, start=state.end())
        parts.append(model(tokens[:, start : start + length], seq, state=state).hidden)
    state.begin(2)
    model(1 + tokens[:, :2] % (VOCAB - 1), SeqInfo.contiguous(2, 2, start=state.end()), state=state)
    state.abort()
    parts.append(model(tokens[:, 6:], SeqInfo.contiguous(2, 2, start=state.end()), state=state).hidden)
    assert_same(model.head(torch.cat(parts, dim=1)), whole, "decoding against forward")


def test_every_part_fits_most_others() -> None:
    tried: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for labels in COMBINATIONS:
        keys = [f"{kind} {label}" for kind, label in zip(KINDS, labels)]
        tried.update(keys)
        try:
            _build(labels, "meta")
        except UserError:
            refused.update(keys)
    lonely = {key: f"{refused[key]} of {n} refused" for key, n in tried.items() if 2 * refused[key] > n}
    assert not lonely, lonely


def test_all_pairs_are_covered() -> None:
    covered = set().union(*(_pairs(dict(enumerate(row))) for row in COMBINATIONS))
    sizes = [len(PARTS[kind]) for kind in KINDS]
    assert len(covered) == sum(a * b for a, b in itertools.combinations(sizes, 2))
