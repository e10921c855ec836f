"""The server over a real model: what it answers is what the engine says, alone or in a crowd, whole or streamed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from evals.serve_load import metric
from llm.generate import Engine, LookupDrafter, Sampling, generate_text, load_model
from llm.generate.load import Loaded
from llm.generate.scheduler import Scheduler
from tests.unit.generate.runs import write_run
from tests.unit.serve.fakes import WAIT, Served, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = ["one", "h\u00e9llo world", "", "x = [", "a b c d e f g h i j", "\u20ac", "zz", "12345"]
TALK = [{"role": "user", "content": "hello"}]


class Real(NamedTuple):
    loaded: Loaded
    scheduler: Scheduler
    server: Served


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    run: Path = write_run(tmp_path_factory.mktemp("runs") / "tiny")
    loaded = load_model(run)
    scheduler = Scheduler(Engine(loaded.model, eos_id=loaded.tokenizer.eos_id, max_batch=4))
    with served(scheduler, tokenizer=loaded.tokenizer, context=48, max_open=64) as server:
        yield Real(loaded, scheduler, server)


def expected(real: Real, prompt: str, **sampling: Any) -> str:
    settings = {"max_new_tokens": 16, "temperature": 0, **sampling}
    return generate_text(*real.loaded[:2], [prompt], Sampling.model_validate(settings))[0]


def body(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 16, "temperature": 0, **more}


def test_in_a_crowd_as_alone(real: Real) -> None:
    wanted = [expected(real, prompt) for prompt in PROMPTS]
    assert len(set(wanted)) > len(PROMPTS) // 2
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda prompt: real.server.json(COMPLETIONS, body(prompt)), PROMPTS * 3))
    assert [answer["choices"][0]["text"] for answer in found] == wanted * 3
    together = real.server.json(COMPLETIONS, body(PROMPTS))
    assert [choice["text"] for choice in together["choices"]] == wanted


def test_a_seed_gives_the_engines_words(real: Real) -> None:
    for settings in ({"temperature": 0.9}, {"temperature": 1.3, "top_k": 20}, {"top_p": 0.8, "temperature": 1.0}):
        found = real.server.json(COMPLETIONS, body("abc", n=2, seed=7) | settings)
        wanted = [expected(real, "abc", seed=seed, **settings) for seed in (7, 8)]
        assert [choice["text"] for choice in found["choices"]] == wanted


@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 0.8}, {"stop": ["a", "e"]}, {"logprobs": 3}], ids=str)
def test_streamed_as_whole(real: Real, more: dict[str, Any]) -> None:
    request = body(["one", "h\u00e9llo"], seed=5, stop=None) | more
    whole = real.server.json(COMPLETIONS, request)["choices"]
    chunks = [c for chunk in real.server.stream(COMPLETIONS, request) for c in chunk["choices"]]
    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert [chunk["finish_reason"] for chunk in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if "logprobs" in more:
            for key in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
                parts: list[Any] = sum((chunk["logprobs"][key] for chunk in own), [])
                assert parts == choice["logprobs"][key]


def test_logprobs_are_the_models(real: Real) -> None:
    import torch

    from llm.core.seq import SeqInfo
    from llm.generate.text import encode_prompt

    model, tokenizer, _ = real.loaded
    found = real.server.json(COMPLETIONS, body("abc", logprobs=4, max_tokens=8, ignore_eos=True, temperature=0))
    logprobs = found["choices"][0]["logprobs"]
    ids = encode_prompt(tokenizer, "abc")
    with torch.no_grad():
        for number, name in enumerate(logprobs["tokens"]):
            hidden = model(torch.tensor([ids]), SeqInfo.contiguous(1, len(ids))).hidden[:, -1]
            own = model.head(hidden).float().log_softmax(-1)[0]
            ids.append(int(own.argmax()))
            assert name == real.server.service.token_name(ids[-1])
            assert math.isclose(logprobs["token_logprobs"][number], float(own.max()), abs_tol=1e-4)
            likeliest = sorted(logprobs["top_logprobs"][number].values(), reverse=True)
            assert torch.allclose(torch.tensor(likeliest), own.topk(4).values, atol=1e-4)


def test_prompts_that_begin_alike_are_read_once(real: Real) -> None:
    model, tokenizer, _ = real.loaded
    begin = "the same beginning, "
    wanted = [expected(real, begin + end) for end in "abc"]
    settings: dict[str, Any] = {"prefix_cache": 10**6, "page_size": 4, "drafter": LookupDrafter()}
    scheduler = Scheduler(Engine(model, eos_id=tokenizer.eos_id, max_batch=4, **settings))
    with served(scheduler, tokenizer=tokenizer, context=48, max_open=64) as server:
        found = server.json(COMPLETIONS, body([begin + end for end in "abc"]))
        server.settle()
        page = server.call("/metrics")[2].decode()
    assert [choice["text"] for choice in found["choices"]] == wanted
    n_prompt = found["usage"]["prompt_tokens"]
    n_reused = int(metric(page, "manyformer_prompt_tokens_reused_total"))
    assert n_reused == 2 * 20
    assert metric(page, "manyformer_prompt_tokens_read_total") == n_prompt - n_reused
    assert metric(page, "manyformer_prompt_tokens_total") == n_prompt
    assert metric(page, "manyformer_prefix_cache_bytes") > 0
    assert metric(page, "manyformer_accepted_tokens_total") == scheduler.speculation.n_accepted > 0


def test_a_disconnect_frees_the_models_memory(real: Real) -> None:
    connections = [real.server.open(COMPLETIONS, body("x", ignore_eos=True, max_tokens=40, n=8)) for _ in range(4)]
    for connection in connections:
        connection.close()
    real.server.settle()
    assert (real.scheduler.n_running, real.scheduler.n_waiting, real.scheduler.state_bytes()) == (0, 0, 0)
    assert real.server.json(COMPLETIONS, body("one"))["choices"][0]["text"] == expected(real, "one")


def test_the_openai_client(real: Real) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{real.server.url}/v1", api_key="none", timeout=WAIT, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    options = {"model": "tiny", "max_tokens": 16, "temperature": 0}
    found = client.completions.create(prompt="one", logprobs=2, **options)
    text = expected(real, "one")
    assert found.choices[0].text == text
    assert found.usage.completion_tokens <= 16 and len(found.choices[0].logprobs.tokens) > 0
    streamed = client.completions.create(prompt="one", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text

    chat = client.chat.completions.create(messages=TALK, logprobs=True, top_logprobs=2, **options)
    answer = chat.choices[0].message.content
    assert answer == expected(real, "User: hello\nAssistant:", stop=["\nUser:", "\nSystem:"])
    assert "".join(token.token for token in chat.choices[0].logprobs.content if token.token.isascii()) != ""
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=TALK, stream=True, **usage, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert chunks[-1].usage == chat.usage
    own = client.completions.create(prompt="one", extra_body={"top_k": 1, "min_p": 0.1}, **options | {"temperature": 1})
    assert own.choices[0].text == text

    for error, request in (
        (openai.BadRequestError, {"prompt": "a" * 100}),
        (openai.NotFoundError, {"prompt": "a", "model": "other"}),
        (openai.BadRequestError, {"prompt": "a", "frequency_penalty": 1.0}),
    ):
        with pytest.raises(error) as caught:
            client.completions.create(**options | request)
        assert caught.value.body["message"]


def test_the_openai_clients_other_errors(real: Real) -> None:
    openai = pytest.importorskip("openai")
    with served(real.scheduler, tokenizer=real.loaded.tokenizer, max_open=1, api_key="k" * 16) as server:
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x" * 16, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k" * 16, max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt=["a", "b"])


def test_the_asynchronous_openai_client(real: Real) -> None:
    openai = pytest.importorskip("openai")

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{real.server.url}/v1", api_key="none", timeout=WAIT) as client:
            asked = [client.completions.create(**body(prompt), model="tiny") for prompt in PROMPTS]
            return [found.choices[0].text for found in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [expected(real, prompt) for prompt in PROMPTS]
