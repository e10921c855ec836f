"""Requests that join a running batch, and a saved state, change nothing, for every mixer, channel and wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm.core.registry import Entry
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import LookupDrafter
from llm.generate.engine import Engine
from llm.generate.prefix import Prefix
from llm.generate.sampling import Sampling
from tests.contracts.test_speculative import CASES, build, parameters

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
PROMPTS = [TEXT, [*TEXT, 7], [*TEXT, 2, 7, 1, 8, 2, 8, 1, 8, 2, 8]]
CONTEXT = 60


def check(model: Any, path: Path) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=8)
    plain = Engine(model, context=CONTEXT).generate(PROMPTS, greedy)
    Prefix.read(model, TEXT, capacity=CONTEXT, chunk=5).save(path)
    prefix = Prefix.load(path)
    for settings in (
        {},
        {"max_batch": 1, "prefill_chunk": 3},
        {"drafter": LookupDrafter(), "draft_length": DraftLength(3)},
    ):
        engine = Engine(model, context=CONTEXT, prefix=prefix, **settings)  # type: ignore[arg-type]
        assert engine.generate(PROMPTS, greedy) == plain, settings


@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] == c[2].name]))
def test_joining_a_running_batch(kind: str, label: str, entry: Entry[Any]) -> None:
    model = build(kind, label, entry)
    prompts = [TEXT[:1], TEXT[:4], TEXT[:5], TEXT, [*TEXT, 7]]
    samplings = [Sampling(temperature=0, max_new_tokens=n) for n in (9, 2, 4, 3, 2)]
    together = Engine(model, max_batch=2).generate(prompts, samplings)
    assert together == Engine(model, max_batch=1).generate(prompts, samplings)


@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] == c[2].name]))
def test_saved_and_loaded(kind: str, label: str, entry: Entry[Any], tmp_path: Path) -> None:
    check(build(kind, label, entry), tmp_path / "text.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] != c[2].name]))
def test_saved_and_loaded_variants(kind: str, label: str, entry: Entry[Any], tmp_path: Path) -> None:
    check(build(kind, label, entry), tmp_path / "text.safetensors")
