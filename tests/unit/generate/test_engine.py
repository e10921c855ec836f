"""Engine: equal to running the whole sequence anew for each token, and independent of what else is in the batch."""

from __future__ import annotations

import pytest
import torch

from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.generate.engine import Engine
from llm.generate.events import Completion, TokenEvent
from llm.generate.prefill import PromptStream
from llm.generate.prefix import Prefix
from llm.generate.sampling import Sampling
from llm.generate.scheduler import Scheduler
from llm.models.config import ModelConfig
from llm.models.decoder import Decoder

VOCAB = 61
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [60, 2], [7, 7, 7, 7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]


KINDS: dict[str, dict[str, object]] = {
    "gqa": {"mixer": {"n_kv_heads": 2}},
    "window": {"mixer": {"window": 5, "n_sinks": 2}},
    "learned": {"mixer": {"qk_norm": "rms_norm"}, "position": "learned"},
    "alibi": {"mixer": {"softcap": 3.0}, "position": "alibi"},
}


def build(kind: str) -> Decoder:
    settings = dict(KINDS[kind])
    mixer = {"type": "attention", "n_heads": 4, **settings.pop("mixer")}  # type: ignore[dict-item]
    block = {"mixer": mixer, "channel": {"type": "swiglu", "d_hidden": 48}}
    tree = {"vocab_size": VOCAB, "d_model": 32, "max_seq_len": 64, "layers": [{"pattern": [block], "repeat": 2}]}
    built = ModelConfig.model_validate({**tree, "init": {"std": 0.3}, **settings}).build("cpu")
    initialise(built, 3)
    return built.eval()


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build("gqa")


@torch.no_grad()
def greedy_without_state(model: Decoder, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        tokens = torch.tensor([ids])
        ids.append(int(model.head(model(tokens, SeqInfo.contiguous(1, len(ids))).hidden[:, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("chunk", [None, 1, 3, 1024])
def test_greedy_equals_recomputation(kind: str, chunk: int | None) -> None:
    model = build(kind)
    engine = Engine(model, prefill_chunk=chunk)
    found = engine.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=20))
    assert [c.tokens for c in found] == [greedy_without_state(model, p, 20) for p in PROMPTS]
    assert {c.finish for c in found} == {"length"}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, max_new_tokens=24),
        Sampling(temperature=0.9, top_k=20, seed=7, max_new_tokens=24),
        Sampling(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=8, max_new_tokens=24),
    ],
    ids=["greedy", "top-k", "top-p"],
)
@pytest.mark.parametrize("eos_id", [None, 11])
def test_result_does_not_depend_on_the_batch(model: Decoder, sampling: Sampling, eos_id: int | None) -> None:
    together = Engine(model, eos_id=eos_id, prefill_chunk=4).generate(PROMPTS, sampling)
    alone = [Engine(model, eos_id=eos_id).generate([prompt], sampling)[0] for prompt in PROMPTS]
    backwards = Engine(model, eos_id=eos_id, max_batch=2).generate(PROMPTS[::-1], sampling)[::-1]
    assert together == alone == backwards


def test_rows_end_by_themselves(model: Decoder) -> None:
    """Rows with different limits leave the batch at different times; the others go on as if nothing had happened."""
    samplings = [Sampling(temperature=0, max_new_tokens=n) for n in (1, 20, 3, 9, 2)]
    found = Engine(model).generate(PROMPTS, samplings)
    assert [len(c.tokens) for c in found] == [1, 20, 3, 9, 2]
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.tokens == greedy_without_state(model, prompt, len(completion.tokens))


@pytest.mark.parametrize("max_batch", [1, 2, 3, 8])
def test_waiting_requests_take_the_places_of_those_that_end(max_batch: int) -> None:
    """Different lengths, limits and settings; the longest output runs beside everything else."""
    model = build("window")
    prompts = [p for p in PROMPTS for _ in range(2)]
    samplings = [Sampling(temperature=0, max_new_tokens=3 + 5 * i % 17) for i in range(len(prompts))]
    samplings[0] = samplings[0].replace(max_new_tokens=50)
    samplings[4] = samplings[4].replace(repetition_penalty=1.4)
    samplings[7] = Sampling(temperature=0.8, seed=3, max_new_tokens=9)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = Engine(model, max_batch=max_batch, prefill_chunk=4).generate(prompts, samplings)
    hook.remove()
    assert max(sizes) <= max_batch
    for prompt, sampling, completion in zip(prompts, samplings, found):
        assert completion == Engine(model).generate([prompt], sampling)[0]


def test_eos_ends_and_can_be_ignored(model: Decoder) -> None:
    expected = greedy_without_state(model, PROMPTS[1], 12)
    eos = expected[5]
    at = expected.index(eos)
    sampling = Sampling(temperature=0, max_new_tokens=12)
    assert Engine(model, eos_id=eos).generate([PROMPTS[1]], sampling) == [Completion(expected[:at], "eos")]
    kept = Engine(model, eos_id=eos).generate([PROMPTS[1]], sampling.replace(ignore_eos=True))
    assert kept == [Completion(expected, "length")]


def test_stop_check_ends_a_row(model: Decoder) -> None:
    expected = [greedy_without_state(model, p, 12) for p in PROMPTS]
    found = Engine(model).generate(
        PROMPTS,
        Sampling(temperature=0, max_new_tokens=12),
        stop=lambda request, token: request == 3 and token == expected[3][4],
    )
    cut = expected[3].index(expected[3][4]) + 1
    assert found[3] == Completion(expected[3][:cut], "stop")
    assert [c.tokens for i, c in enumerate(found) if i != 3] == [e for i, e in enumerate(expected) if i != 3]


def test_a_learned_position_table_limits_the_context() -> None:
    with pytest.raises(UserError, match="context=65 is more than the 64 tokens"):
        Engine(build("learned"), context=65)


def test_the_context_is_the_end(model: Decoder) -> None:
    found = Engine(model, context=20).generate(PROMPTS, Sampling(temperature=0, max_new_tokens=15))
    assert [(len(p) + len(c.tokens), c.finish) for p, c in zip(PROMPTS, found, strict=True)] == [
        (16, "length"), (20, "context"), (17, "length"), (19, "length"), (20, "context")
    ]  # fmt: skip


def test_events_come_one_by_one(model: Decoder) -> None:
    events = list(Engine(model).stream([[1], [2, 3]], Sampling(temperature=0, max_new_tokens=3)))
    assert [e.request for e in events] == [0, 1, 0, 1, 0, 1]
    assert [e.finish for e in events] == [None] * 4 + ["length"] * 2
    assert all(isinstance(e, TokenEvent) for e in events)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([61], "token id 61"),
        ([-1], "token id -1"),
        ([1] * 64, "64 tokens and the model's context is 64"),
    ],
)
def test_impossible_prompts(model: Decoder, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(model).generate([[1], prompt], Sampling())


def test_seeds(model: Decoder) -> None:
    def run(seed: int | None) -> list[int]:
        return Engine(model).generate([[1, 2]], Sampling(seed=seed, max_new_tokens=20))[0].tokens

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert run(None) != run(None)


def stream_of(prompt: list[int], size: int) -> PromptStream:
    return PromptStream(len(prompt), lambda: [prompt[i : i + size] for i in range(0, len(prompt), size)])


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_streamed_prompt_is_continued_as_one_that_is_held(model: Decoder, chunk: int | None, size: int) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=12)
    mixed = [stream_of(prompt, size) if i % 3 else prompt for i, prompt in enumerate(PROMPTS)]
    expected = Engine(model).generate(PROMPTS, sampling)
    assert Engine(model, prefill_chunk=chunk, max_batch=3).generate(mixed, sampling) == expected
    penalised = [sampling.replace(repetition_penalty=1.0 if i % 3 else 1.4) for i in range(len(PROMPTS))]
    expected = Engine(model).generate(PROMPTS, penalised)
    assert Engine(model, prefill_chunk=chunk).generate(mixed, penalised) == expected


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_leaves_while_the_prompts_are_read(model: Decoder, streamed: bool) -> None:
    scheduler = Scheduler(Engine(model, prefill_chunk=2))
    sampling = Sampling(temperature=0, max_new_tokens=5)
    prompts = [stream_of(p, 3) if streamed else p for p in (PROMPTS[1], PROMPTS[4], PROMPTS[3])]
    numbers = [scheduler.submit(prompt, sampling) for prompt in prompts]
    scheduler._admit()
    assert scheduler._joining is not None and scheduler._joining.prefill is not None
    with torch.no_grad():
        scheduler._joining.prefill.read()
    scheduler.cancel(numbers[1])
    made: dict[int, list[int]] = {}
    while scheduler.n_running:
        for event in scheduler.step():
            made.setdefault(event.request, []).append(event.token)
    expected = Engine(model).generate([PROMPTS[1], PROMPTS[3]], sampling)
    assert [made[numbers[0]], made[numbers[2]]] == [c.tokens for c in expected]


def test_what_needs_the_whole_prompt_refuses_a_stream(model: Decoder) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=2)
    with pytest.raises(UserError, match="no repetition_penalty"):
        Engine(model).generate([stream_of([1, 2], 1)], greedy.replace(repetition_penalty=1.5))
    with pytest.raises(UserError, match="0 to 60: is this the tokenizer"):
        Engine(model).generate([stream_of([1, VOCAB], 1)], greedy)
    with pytest.raises(UserError, match="leaves no room"):
        Engine(model).generate([stream_of([1] * 64, 8)], greedy)
    with pytest.raises(UserError, match="no tokens"):
        Engine(model).generate([stream_of([], 8)], greedy)
    prefix = Prefix.read(model, [1, 2, 3], capacity=64)
    with pytest.raises(UserError, match="neither a saved state"):
        Engine(model, prefix=prefix).generate([stream_of([1, 2, 3, 4], 1)], greedy)
