"""Greedy speculative decoding gives the tokens of plain decoding, for every mixer, channel mixer and wrapper."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.blocks.base import CHANNELS, MIXERS
from llm.core.registry import Entry
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import Batch, Draft, LookupDrafter, ModelDrafter
from llm.generate.engine import Engine
from llm.generate.sampling import Sampling
from llm.models.wrappers.base import WRAPPERS
from tests.contracts.checks.harness import VOCAB, fill, tiny_model
from tests.contracts.checks.wrappers import wrapped_model

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [7, 7, 7, 1], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]]


class Foreteller:
    """Knows what plain decoding will say, and says something else now and then: rollbacks of every length occur."""

    name = "foreteller"
    vocab_size: int | None = None

    def __init__(self, outputs: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.all, self.random = outputs, random.Random(seed)
        self.rest: list[list[int]] = []

    def check(self, n_tokens: int) -> None:
        """Any length will do."""

    def start(self, batch: Batch, pending: Tensor) -> None:
        self.rest = []
        self.extend(batch, pending)

    def extend(self, batch: Batch, pending: Tensor) -> None:
        known = {tuple(prompt): output for prompt, output in zip(PROMPTS, self.all)}
        self.rest += [list(known[tuple(prompt)][1:]) for prompt in batch.prompts]

    def propose(self, pending: Tensor, counts: Tensor, state: Any, sampler: Any) -> Draft:
        drafts = []
        for rest, n in zip(self.rest, counts.tolist()):
            told = [t if self.random.random() < 0.7 else self.random.randrange(VOCAB) for t in rest[:n]]
            drafts.append(told[: self.random.randint(0, n)])
        longest = max(len(draft) for draft in drafts)
        padded = [draft + [0] * (longest - len(draft)) for draft in drafts]
        return Draft(
            torch.tensor(padded, dtype=torch.int64).view(len(drafts), longest), torch.tensor([len(d) for d in drafts])
        )

    def committed(self, draft: Draft, accepted: Tensor, ids: Tensor) -> None:
        self.rest = [rest[n + 1 :] for rest, n in zip(self.rest, accepted.tolist())]

    def keep(self, rows: Sequence[int]) -> None:
        self.rest = [self.rest[row] for row in rows]

    def compile(self) -> None:
        """There is no model."""

    def state_bytes(self) -> int:
        return 0


class Branching(Foreteller):
    """Tells two or three things at once for some rows, of which the last one is as often right as the Foreteller."""

    def propose(self, pending: Tensor, counts: Tensor, state: Any, sampler: Any) -> Draft:
        own = super().propose(pending, counts, state, sampler)
        drafts, rows = [], []
        for row, (tokens, n) in enumerate(zip(own.tokens.tolist(), own.counts.tolist())):
            others = self.random.randint(0, 2) if n else 0
            drafts += [[(tokens[0] + 1 + i) % VOCAB, *tokens[1:n]] for i in range(others)] + [tokens[:n]]
            rows += [row] * (others + 1)
        padded = [draft + [0] * (own.tokens.shape[1] - len(draft)) for draft in drafts]
        tokens = torch.tensor(padded, dtype=torch.int64).view(len(drafts), own.tokens.shape[1])
        return Draft(tokens, torch.tensor([len(d) for d in drafts]), rows=torch.tensor(rows))


def build(kind: str, label: str, entry: Entry[Any]) -> Any:
    make = entry.variants()[label]
    attention = MIXERS.entry("attention").tiny()
    config = {
        "mixer": lambda: tiny_model(make(), max_seq_len=300),
        "channel": lambda: tiny_model(attention, make(), max_seq_len=300),
        "wrapper": lambda: wrapped_model(make()).replace(max_seq_len=300),
    }[kind]()
    return fill(config.build("cpu")).eval()


@cache
def _small_model() -> Any:
    return fill(tiny_model(MIXERS.entry("attention").tiny(), n_layers=1, max_seq_len=300).build("cpu"), seed=1).eval()


CASES = [
    (kind, label, entry)
    for kind, registry in (("mixer", MIXERS), ("channel", CHANNELS), ("wrapper", WRAPPERS))
    for entry in registry.entries()
    for label in entry.variants()
]


def parameters(cases: Sequence[tuple[str, str, Entry[Any]]]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in cases]


def check(model: Any, drafters: Sequence[str], *, n: int, most: int, batches: Sequence[int]) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=n)
    plain = [c.tokens for c in Engine(model).generate(PROMPTS, greedy)]
    make: dict[str, Any] = {
        "foreteller": lambda: Foreteller(plain),
        "branching": lambda: Branching(plain),
        "lookup": LookupDrafter,
        "lookup-tree": lambda: LookupDrafter(n_branches=3),
        "model": lambda: ModelDrafter(_small_model()),
        "itself": lambda: ModelDrafter(model),
    }
    for name, batch in itertools.product(drafters, batches):
        engine = Engine(model, max_batch=batch, drafter=make[name](), draft_length=DraftLength(most))
        assert [c.tokens for c in engine.generate(PROMPTS, greedy)] == plain, f"{name}, batch {batch}"
        if name == "itself":
            assert engine.speculation.acceptance == 1.0
        if name in ("foreteller", "branching"):
            assert 0 < engine.speculation.n_accepted < engine.speculation.n_drafted


@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] == c[2].name]))
def test_rollbacks_leave_no_trace(kind: str, label: str, entry: Entry[Any]) -> None:
    check(build(kind, label, entry), ["foreteller", "branching"], n=10, most=3, batches=[4])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "label", "entry"), parameters(CASES))
def test_every_drafter_over_256_tokens(kind: str, label: str, entry: Entry[Any]) -> None:
    check(
        build(kind, label, entry),
        ["foreteller", "branching", "lookup", "lookup-tree", "model", "itself"],
        n=256,
        most=5,
        batches=[4, 1],
    )
