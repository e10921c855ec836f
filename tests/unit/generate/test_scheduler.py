"""Scheduler: requests that come and go at any moment get what they would get alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.generate import DraftLength, Engine, LookupDrafter, ModelDrafter, Sampling, Scheduler, TokenEvent
from tests.unit.generate.test_engine import PROMPTS, build

GREEDY = Sampling(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("gqa")


def drain(scheduler: Scheduler) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while scheduler.n_running or scheduler.n_waiting:
        events += scheduler.step()
    assert scheduler.step() == []
    return events


def engine_of(model: Any, kind: str | None, **settings: Any) -> Engine:
    drafter: Any = {None: lambda: None, "lookup": LookupDrafter, "model": lambda: ModelDrafter(model)}[kind]()
    return Engine(model, drafter=drafter, draft_length=DraftLength(3), **settings)


@pytest.mark.parametrize("drafter", [None, "lookup", "model"])
def test_cancelling_frees_row_place_and_memory(model: Any, drafter: str | None) -> None:
    scheduler = Scheduler(engine_of(model, drafter, max_batch=2))
    first, second, third = (scheduler.submit(prompt, GREEDY) for prompt in PROMPTS[:3])
    assert (scheduler.n_running, scheduler.n_waiting, scheduler.state_bytes()) == (0, 3, 0)
    assert {event.request for event in scheduler.step()} == {first, second}
    assert (scheduler.n_running, scheduler.n_waiting) == (2, 1)
    held = scheduler.state_bytes()
    scheduler.cancel(first)
    assert (scheduler.n_running, scheduler.n_waiting) == (1, 1)
    assert 0 < scheduler.state_bytes() < held
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert {event.request for event in scheduler.step()} == {second, third}
    hook.remove()
    assert max(sizes) <= 2
    for request in (second, third, first, 99):
        scheduler.cancel(request)
    assert (scheduler.n_running, scheduler.n_waiting, scheduler.state_bytes()) == (0, 0, 0)
    assert scheduler.step() == []
    assert scheduler.submit(PROMPTS[0], GREEDY) == 3
    assert {event.request for event in drain(scheduler)} == {3}
    assert scheduler.state_bytes() == 0


def test_a_request_may_cancel_others_and_itself_as_it_speaks(model: Any) -> None:
    scheduler = Scheduler(engine_of(model, "lookup"))
    said: list[int] = []

    def stop(token: int) -> bool:
        said.append(token)
        if len(said) == 3:
            scheduler.cancel(other)
            scheduler.cancel(own)
        return False

    own = scheduler.submit(PROMPTS[1], GREEDY, stop=stop)
    other = scheduler.submit(PROMPTS[2], GREEDY)
    drain(scheduler)
    assert len(said) == 3


def test_a_long_prompt_does_not_hold_up_those_that_run(model: Any) -> None:
    """Each step reads one chunk and gives every running request a token."""
    scheduler = Scheduler(Engine(model, prefill_chunk=4))
    short = scheduler.submit([5], GREEDY)
    scheduler.step()
    long = scheduler.submit(list(range(1, 33)), GREEDY)
    for step in range(8):
        assert {event.request for event in scheduler.step()} == ({short, long} if step == 7 else {short})
    assert scheduler.n_running == 2


def test_a_request_does_not_wait_where_all_find_a_place(model: Any) -> None:
    scheduler = Scheduler(Engine(model, max_batch=8))
    for _ in range(7):
        scheduler.submit([5], GREEDY)
    scheduler.step()
    late = scheduler.submit([6], GREEDY)
    assert late in {event.request for event in scheduler.step()}


@pytest.mark.parametrize("drafter", [None, "lookup", "model"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7, top_k=5, repetition_penalty=1.2, seed=3)])
@torch.no_grad()
def test_log_probabilities_are_the_models_own(model: Any, drafter: str | None, sampling: Sampling) -> None:
    scheduler = Scheduler(engine_of(model, drafter))
    asked = sampling.replace(max_new_tokens=12)
    requests = {scheduler.submit(p, asked, n_logprobs=n): (p, n) for p, n in zip(PROMPTS, (3, 0, None, 100, 1))}
    found: dict[int, list[TokenEvent]] = {request: [] for request in requests}
    for event in drain(scheduler):
        found[event.request].append(event)
    for request, (prompt, n) in requests.items():
        events = found[request]
        ids = [*prompt, *(event.token for event in events)]
        hidden = model(torch.tensor([ids]), SeqInfo.contiguous(1, len(ids))).hidden[0]
        wanted = model.head(hidden)[len(prompt) - 1 : -1].float().log_softmax(-1)
        for event, row in zip(events, wanted, strict=True):
            if n is None:
                assert event.logprob is None and event.top_logprobs == ()
                continue
            assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
            assert len(event.top_logprobs) == min(n, len(row))
            values = [value for _, value in event.top_logprobs]
            assert values == pytest.approx(row.sort(descending=True).values[:n].tolist(), abs=1e-4)
            assert all(value == pytest.approx(float(row[token]), abs=1e-4) for token, value in event.top_logprobs)


@pytest.mark.parametrize("drafter", [None, "lookup", "model"])
def test_sampled_outputs_depend_on_the_request_alone(model: Any, drafter: str | None) -> None:
    samplings = [Sampling(temperature=0.9, top_p=0.9, seed=seed, max_new_tokens=5 + 3 * seed) for seed in range(5)]
    alone = [engine_of(model, drafter).generate([p], s)[0] for p, s in zip(PROMPTS, samplings)]
    rng = random.Random(0)
    scheduler = Scheduler(engine_of(model, drafter, max_batch=3, prefill_chunk=3))
    tokens: dict[int, list[int]] = {}
    for prompt, sampling in zip(PROMPTS, samplings):
        tokens[scheduler.submit(prompt, sampling)] = []
        for _ in range(rng.randrange(3)):
            for event in scheduler.step():
                tokens[event.request].append(event.token)
    for event in drain(scheduler):
        tokens[event.request].append(event.token)
    assert list(tokens.values()) == [completion.tokens for completion in alone]


def test_memory_follows_what_is_held(model: Any) -> None:
    """A context that is allowed but not used costs nothing; a long request gives its memory back when it ends."""
    short, wide = (Scheduler(Engine(model, context=context)) for context in (64, 4096))
    for scheduler in (short, wide):
        scheduler.submit([5], GREEDY)
        scheduler.step()
    assert short.state_bytes() == wide.state_bytes()
    long = wide.submit([7] * 1000, GREEDY)
    wide.step()
    assert wide.state_bytes() == 2 * 16 * short.state_bytes()
    wide.cancel(long)
    assert wide.state_bytes() == short.state_bytes()


def test_what_cannot_be_continued_is_refused_at_once(model: Any) -> None:
    scheduler = Scheduler(Engine(model))
    for prompt, message in (([], "the prompt has no tokens"), ([61], "token id 61"), ([1] * 64, "context is 64")):
        with pytest.raises(UserError, match=message):
            scheduler.submit(prompt, GREEDY)
    drafting = Scheduler(Engine(model, context=100, drafter=ModelDrafter(build("learned"))))
    drafting.submit([1] * 40, GREEDY)
    with pytest.raises(UserError, match="too few to draft for a prompt and output of 72"):
        drafting.submit([1] * 60, GREEDY)
    assert scheduler.n_waiting == 0 and drafting.n_waiting == 1
