"""Any parts that fit together build, train one step, count right and decode, on a CPU.

All triples mixer x channel x linear (of their main variants) are tried, and all pairs of parts of any two kinds, all
variants included. Those that show each mixer with each linear, and between them most other pairs, run in the fast
suite, the rest are marked slow. Parts that do not fit say so with a UserError when the model is built; each part must
fit most of the others.
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


def combinations() -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """(fast, slow) rows of one label per kind. Kinds that a row does not fix are chosen to cover many new pairs."""
    registries: list[list[Any]] = [[MIXERS, EXAMPLES], [CHANNELS], [LINEARS]]
    mixers, channels, linears = (list(_variants(kind, main_only=True)) for kind in registries)
    left = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(KINDS)), 2)
        for a in PARTS[KINDS[i]]
        for b in PARTS[KINDS[j]]
    }
    fast = [
        _complete({0: mixer, 2: linear}, left, {1: channels}) for mixer, linear in itertools.product(mixers, linears)
    ]
    done = {row[:3] for row in fast}
    slow = [
        _complete(dict(enumerate(triple)), left)
        for triple in itertools.product(mixers, channels, linears)
        if triple not in done
    ]
    while left:
        i, a, j, b = min(left)
        slow.append(_complete({i: a, j: b}, left))
    return fast, slow


def _complete(
    row: dict[int, str], left: set[tuple[int, str, int, str]], among: dict[int, list[str]] | None = None
) -> tuple[str, ...]:
    for kind in range(len(KINDS)):
        if kind not in row:
            candidates = (among or {}).get(kind) or list(PARTS[KINDS[kind]])
            row[kind] = max(candidates, key=lambda label: len(_pairs(row | {kind: label}) & left))
    left -= _pairs(row)
    return tuple(row[kind] for kind in range(len(KINDS)))


def _pairs(row: dict[int, str]) -> set[tuple[int, str, int, str]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(sorted(row), 2)}


FAST, SLOW = combinations()
COMBINATIONS = [*FAST, *SLOW]
CASES = [*FAST, *(pytest.param(labels, marks=pytest.mark.slow, id="-".join(labels)) for labels in SLOW)]


def _model(labels: tuple[str, ...]) -> Any:
    parts = {kind: PARTS[kind][label]() for kind, label in zip(KINDS, labels)}
    linear = {"*": parts.pop("linear")}
    return tiny_model(parts.pop("mixer"), parts.pop("channel"), n_layers=1, linear=linear, **parts)


def _build(labels: tuple[str, ...], device: str) -> Any:
    config = _model(labels)
    return config, config.build(device)


@pytest.mark.parametrize("labels", CASES, ids="-".join)
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
