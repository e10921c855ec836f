"""Pages, and prompts that share what was read of others, change no token, for every mixer, channel and wrapper."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llm.core.registry import Entry
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import LookupDrafter
from llm.generate.engine import Engine
from llm.generate.sampling import Sampling
from llm.generate.scheduler import Scheduler
from tests.contracts.checks.harness import VOCAB
from tests.contracts.test_speculative import CASES, build, parameters

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
OTHER = [5, 8, 2, 9, 9, 1, 7, 3, 2, 2, 6, 1]
PROMPTS = [TEXT, OTHER, [*TEXT, 7], TEXT[:9], [*OTHER, 1], [*TEXT, 2, 7, 1, 8, 2, 8, 1], [*TEXT[:6], 1, 1, 1], TEXT]
CONTEXT, PAGE = 60, 4
GREEDY = Sampling(temperature=0, max_new_tokens=8)


def check(model: Any, *, settings: list[dict[str, Any]]) -> None:
    plain = [completion.tokens for completion in Engine(model, context=CONTEXT).generate(PROMPTS, GREEDY)]
    assert all(max(tokens) < VOCAB for tokens in plain)
    # The last prompt is a conversation's next turn, which begins with an answer.
    prompts = [*PROMPTS, [*PROMPTS[2], *plain[2], 2]]
    plain += [completion.tokens for completion in Engine(model, context=CONTEXT).generate(prompts[-1:], GREEDY)]
    for each in settings:
        engine = Engine(model, context=CONTEXT, page_size=PAGE, **each)
        scheduler = Scheduler(engine)
        found: dict[int, list[int]] = {}
        wanted: dict[int, list[int]] = {}
        for prompt, tokens in zip(prompts, plain, strict=True):
            wanted[scheduler.submit(prompt, GREEDY)] = tokens
            # The first two are read together.
            for _ in range(random.Random(len(wanted)).randint(1, 4) if len(wanted) > 1 else 0):
                for event in scheduler.step():
                    found.setdefault(event.request, []).append(event.token)
        while scheduler.n_running or scheduler.n_waiting:
            for event in scheduler.step():
                found.setdefault(event.request, []).append(event.token)
        assert found == wanted, each
        assert (scheduler.n_prompt_reused > 0) == (engine.prefix_cache > 0)
        assert scheduler.n_prompt_read + scheduler.n_prompt_reused == sum(map(len, prompts))
        if scheduler.prefix_cache is not None:
            scheduler.prefix_cache.clear()
        assert scheduler.state_bytes() == 0, "a page is held by nobody"


SHARED = {"prefix_cache": 10**6, "max_batch": 3, "prefill_chunk": 4}
MORE: list[dict[str, Any]] = [
    {"cache": "paged"},
    {"prefix_cache": 10**6, "max_batch": 1, "prefill_chunk": 3},
    {"prefix_cache": 10**6, "prefill_chunk": 8, "drafter": LookupDrafter(), "draft_length": DraftLength(3)},
]


@pytest.mark.parametrize(("kind", "label", "entry"), parameters([c for c in CASES if c[1] == c[2].name]))
def test_shared_prefixes(kind: str, label: str, entry: Entry[Any]) -> None:
    check(build(kind, label, entry), settings=[SHARED])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "label", "entry"), parameters(CASES))
def test_shared_prefixes_of_variants(kind: str, label: str, entry: Entry[Any]) -> None:
    check(build(kind, label, entry), settings=[SHARED, *MORE])


def test_the_settings_one_by_one() -> None:
    case = next(c for c in CASES if c[1] == "attention-gqa")
    check(build(*case), settings=MORE)
