"""Requests submitted and cancelled at random moments get the tokens of a plain run, for every mixer and wrapper."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llm.core.registry import Entry
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import LookupDrafter, ModelDrafter
from llm.generate.engine import Engine
from llm.generate.sampling import Sampling
from llm.generate.scheduler import Scheduler
from tests.contracts.test_speculative import CASES, PROMPTS, Foreteller, build, parameters


def check(model: Any, drafter: str, seed: int, *, n_requests: int = 12, n_tokens: int = 9) -> None:
    rng = random.Random(seed)
    greedy = Sampling(temperature=0, max_new_tokens=n_tokens)
    plain = [completion.tokens for completion in Engine(model, max_batch=1).generate(PROMPTS, greedy)]
    drafters: dict[str, Any] = {
        "plain": lambda: None,
        "foreteller": lambda: Foreteller(plain),
        "lookup": LookupDrafter,
        "model": lambda: ModelDrafter(model),
    }
    engine = Engine(model, max_batch=3, prefill_chunk=4, drafter=drafters[drafter](), draft_length=DraftLength(3))
    scheduler = Scheduler(engine)
    wanted: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    while len(wanted) < n_requests or scheduler.n_running or scheduler.n_waiting:
        if len(wanted) < n_requests and rng.random() < 0.5:
            which = rng.randrange(len(PROMPTS))
            n = rng.randint(1, n_tokens)
            request = scheduler.submit(PROMPTS[which], greedy.replace(max_new_tokens=n))
            wanted[request], found[request] = plain[which][:n], []
        if wanted and rng.random() < 0.15:
            request = rng.choice(list(wanted))
            scheduler.cancel(request)
            if len(found[request]) < len(wanted[request]):
                cancelled.add(request)
        for event in scheduler.step():
            assert event.request not in cancelled
            found[event.request].append(event.token)
            assert (event.finish is not None) == (len(found[event.request]) == len(wanted[event.request]))
    assert scheduler.state_bytes() == 0
    for request, tokens in wanted.items():
        if request in cancelled:
            assert found[request] == tokens[: len(found[request])]
        else:
            assert found[request] == tokens


MAIN = [case for case in CASES if case[1] == case[2].name and case[0] != "channel"]


@pytest.mark.parametrize(("kind", "label", "entry"), parameters(MAIN))
def test_coming_and_going(kind: str, label: str, entry: Entry[Any]) -> None:
    check(build(kind, label, entry), "foreteller" if len(label) % 2 else "plain", seed=len(label))


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["plain", "foreteller", "lookup", "model"])
@pytest.mark.parametrize(("kind", "label", "entry"), parameters(CASES))
def test_coming_and_going_with_every_drafter(kind: str, label: str, entry: Entry[Any], drafter: str) -> None:
    model = build(kind, label, entry)
    for seed in range(3):
        check(model, drafter, seed)
