"""The prefix cache: what is found again, what is forgotten first, and what the scheduler reads because of it."""

from __future__ import annotations

from typing import Any

import pytest

from llm.core.errors import UserError
from llm.core.state import PagedKVState
from llm.core.states.paged import leaves
from llm.generate import Engine, Sampling, Scheduler
from llm.generate.prefill import PromptStream
from llm.generate.prefix import Prefix
from tests.unit.generate.test_engine import build

PAGE = 4
GREEDY = Sampling(temperature=0, max_new_tokens=3, ignore_eos=True)
SYSTEM = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("gqa")


def scheduler_of(model: Any, **settings: Any) -> Scheduler:
    return Scheduler(Engine(model, page_size=PAGE, **{"prefix_cache": 10**6, **settings}))


def run(scheduler: Scheduler, *prompts: list[int]) -> None:
    for prompt in prompts:
        scheduler.submit(prompt, GREEDY)
    while scheduler.n_running or scheduler.n_waiting:
        scheduler.step()


def counts(scheduler: Scheduler) -> tuple[int, int]:
    found = (scheduler.n_prompt_read, scheduler.n_prompt_reused)
    scheduler.n_prompt_read = scheduler.n_prompt_reused = 0
    return found


def test_full_pages_are_reused_and_the_last_token_is_read(model: Any) -> None:
    scheduler = scheduler_of(model)
    run(scheduler, SYSTEM)
    assert counts(scheduler) == (10, 0)
    run(scheduler, [*SYSTEM, 1, 2])
    assert counts(scheduler) == (4, 8)
    run(scheduler, SYSTEM[:8])
    assert counts(scheduler) == (4, 4), "of two full pages the second is read again: a prompt needs a last token"
    run(scheduler, [*SYSTEM[:7], 1, *SYSTEM[8:]])
    assert counts(scheduler) == (6, 4)
    run(scheduler, [1, *SYSTEM])
    assert counts(scheduler) == (11, 0), "the same tokens elsewhere are something else"


def test_requests_that_come_together_read_what_they_share_once(model: Any) -> None:
    sizes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    scheduler = scheduler_of(model, max_batch=8)
    run(scheduler, *([*SYSTEM, token] for token in (1, 2, 3)), [9] * 6)
    hook.remove()
    assert counts(scheduler) == (11 + 3 + 3 + 6, 16)
    assert sizes[0] == (2, 11), "one of each beginning at first"


def test_pages_of_running_requests_are_shared(model: Any) -> None:
    scheduler = scheduler_of(model)
    long = GREEDY.replace(max_new_tokens=30)
    scheduler.submit(SYSTEM, long)
    scheduler.step()
    scheduler.submit([*SYSTEM, 3], long)
    scheduler.step()
    assert scheduler.n_running == 2 and counts(scheduler) == (13, 8)
    running = scheduler._running
    assert running is not None
    part = next(part for part in leaves(running.state) if isinstance(part, PagedKVState))
    assert part.tables[0][:2] == part.tables[1][:2]
    assert part.pool.n_holders[part.tables[0][0]] == 3, "two rows and the cache"


def test_an_answer_is_part_of_the_next_prompt(model: Any) -> None:
    scheduler = scheduler_of(model)
    answer = Engine(model).generate([SYSTEM], GREEDY.replace(max_new_tokens=8))[0].tokens
    scheduler.submit(SYSTEM, GREEDY.replace(max_new_tokens=8))
    while scheduler.n_running or scheduler.n_waiting:
        scheduler.step()
    counts(scheduler)
    run(scheduler, [*SYSTEM, *answer, 5])
    assert counts(scheduler) == (3, 16)


def test_the_end_of_the_text_that_was_used_longest_ago_is_forgotten_first(model: Any) -> None:
    scheduler = scheduler_of(model)
    assert scheduler.pages is not None
    run(scheduler, [1] * 5)
    page = scheduler.pages.page_bytes()
    assert scheduler.prefix_cache is not None and scheduler.prefix_cache.held_bytes() == page
    scheduler = scheduler_of(model, prefix_cache=3 * page)
    run(scheduler, SYSTEM[:9], [1] * 5)
    run(scheduler, SYSTEM[:9], [2] * 5)
    counts(scheduler)
    assert scheduler.prefix_cache is not None and scheduler.prefix_cache.held_bytes() == 3 * page
    run(scheduler, [1] * 5)
    assert counts(scheduler) == (5, 0)
    run(scheduler, SYSTEM[:9])
    assert counts(scheduler) == (5, 4), "its second page has gone, its first is there"


def test_cancelled_requests_leave_what_they_read(model: Any) -> None:
    scheduler = scheduler_of(model, prefill_chunk=6, max_batch=2)
    scheduler.submit([5], GREEDY.replace(max_new_tokens=20))
    scheduler.step()
    request = scheduler.submit([*SYSTEM, 1, 2, 3, 4, 5, 6], GREEDY)
    scheduler.step()
    scheduler.cancel(request)
    counts(scheduler)
    run(scheduler, [*SYSTEM, 1])
    assert counts(scheduler) == (7, 4)


def test_states_of_other_kinds_are_saved_between_chunks() -> None:
    window = build("window")
    scheduler = scheduler_of(window, prefill_chunk=9)
    assert (scheduler.engine.saves_states, scheduler.engine.saved_every, scheduler.engine.prefill_chunk) == (True, 8, 8)
    prompts = [[*SYSTEM, *SYSTEM, token] for token in range(3)]
    wanted = [completion.tokens for completion in Engine(window).generate(prompts, GREEDY)]
    found: dict[int, list[int]] = {}
    for prompt in prompts:
        scheduler.submit(prompt, GREEDY)
    while scheduler.n_running or scheduler.n_waiting:
        for event in scheduler.step():
            found.setdefault(event.request, []).append(event.token)
    assert [found[number] for number in range(3)] == wanted
    assert counts(scheduler) == (21 + 2 * 5, 2 * 16)
    cache = scheduler.prefix_cache
    assert cache is not None and scheduler.state_bytes() == cache.held_bytes() == cache.saved_bytes() > 0
    one = cache.held_bytes() // 2
    small = scheduler_of(window, prefill_chunk=8, prefix_cache=one)
    run(small, [*SYSTEM, *SYSTEM, 1], [*SYSTEM, *SYSTEM, 2])
    assert counts(small) == (21 + 13, 8) and small.state_bytes() == one
    assert Engine(window, prefix_cache=1000, page_size=16).saved_every == 256


def test_settings_that_do_not_go_together(model: Any, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="cache=contiguous has not"):
        Engine(model, cache="contiguous", prefix_cache=1000)
    with pytest.raises(UserError, match="compile is for contiguous caches"):
        Engine(model, compile=True, cache="paged")
    with pytest.raises(UserError, match="goes with no prefix_cache"):
        scheduler_of(model).submit(PromptStream(3, lambda: [[1, 2, 3]]), GREEDY)
    engine = Engine(model)
    prefix = Prefix.read(model, [1, 2, 3], capacity=engine.context)
    with pytest.raises(UserError, match="are not used together"):
        Engine(model, prefix=prefix, prefix_cache=1000)
    assert Engine(model, prefix=prefix, cache="paged").generate([[1, 2, 3, 4]], GREEDY) == engine.generate(
        [[1, 2, 3, 4]], GREEDY
    )
