"""Requests that cannot be answered get 4xx with OpenAI's error object and a message that names the mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from tests.unit.serve.fakes import PacedScheduler, Served, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
DEEP = b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"

MALFORMED: list[tuple[str, str, Any, int, str]] = [
    ("no-json", COMPLETIONS, b"{prompt: 1}", 400, "the body is no JSON"),
    ("empty-body", COMPLETIONS, b"", 400, "the body is no JSON"),
    ("cut-short", COMPLETIONS, b'{"prompt": "a', 400, "the body is no JSON"),
    ("not-utf8", COMPLETIONS, b'{"prompt": "caf\xe9"}', 400, "not valid UTF-8: byte 0xe9 at 15"),
    ("a-list", COMPLETIONS, [{"prompt": "a"}], 400, "must be a JSON object"),
    ("nan", COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
    ("infinite", COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    ("nested", COMPLETIONS, DEEP, 400, "prompt|nested"),
    ("huge-number", COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "number that cannot be read"),
    ("surrogate", COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
    ("unknown", COMPLETIONS, {"prompt": "a", "temprature": 1}, 400, "did you mean 'temperature'"),
    ("no-prompt", COMPLETIONS, {}, 400, "prompt is missing"),
    ("null-prompt", COMPLETIONS, {"prompt": None}, 400, "prompt is missing"),
    ("prompt-number", COMPLETIONS, {"prompt": 7}, 400, "prompt must be a text"),
    ("prompt-object", COMPLETIONS, {"prompt": {"text": "a"}}, 400, "prompt must be a text"),
    ("prompt-mixed", COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt must be a text"),
    ("no-prompts", COMPLETIONS, {"prompt": []}, 400, "empty list"),
    ("bool-ids", COMPLETIONS, {"prompt": [True, False]}, 400, "prompt must be a text"),
    ("id-too-large", COMPLETIONS, {"prompt": [1, 10**20]}, 400, "token id"),
    ("id-negative", COMPLETIONS, {"prompt": [-1]}, 400, "token id"),
    ("too-long", COMPLETIONS, {"prompt": "a" * 64}, 400, "the prompt has 65 tokens"),
    ("no-room", COMPLETIONS, {"prompt": "a" * 40, "max_tokens": 30}, 400, "30 new ones are asked for"),
    ("no-output", COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("output-text", COMPLETIONS, {"prompt": "a", "max_tokens": "ten"}, 400, "must be a whole number"),
    ("output-huge", COMPLETIONS, {"prompt": "a", "max_tokens": 10**30}, 400, "new tokens are asked for"),
    ("cold", COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("too-cold", COMPLETIONS, {"prompt": "a", "temperature": 1e-300}, 400, "temperature must be 0"),
    ("top-p", COMPLETIONS, {"prompt": "a", "top_p": 1.5}, 400, "top_p"),
    ("top-k", COMPLETIONS, {"prompt": "a", "top_k": 0}, 400, "top_k"),
    ("penalty", COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("n-zero", COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n: "),
    ("n-large", COMPLETIONS, {"prompt": ["a", "b"], "n": 9}, 400, "make 18 texts; allowed: 16"),
    ("seed", COMPLETIONS, {"prompt": "a", "seed": -1}, 400, "seed"),
    ("logprobs", COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    ("stop-empty", COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop"),
    ("stop-number", COMPLETIONS, {"prompt": "a", "stop": [1]}, 400, "stop"),
    ("stop-many", COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, 400, "at most 16"),
    ("stream-text", COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "stream: must be true or false"),
    ("stream-options", COMPLETIONS, {"prompt": "a", "stream_options": {}}, 400, "no effect without stream=true"),
    ("echo", COMPLETIONS, {"prompt": "a", "echo": True}, 400, "echo is not supported"),
    ("frequency", COMPLETIONS, {"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty is not supported"),
    ("tools", CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
    ("wrong-model", COMPLETIONS, {"prompt": "a", "model": "gpt-4"}, 404, "there is no model 'gpt-4'; allowed: tiny"),
    ("no-messages", CHAT, {"messages": []}, 400, "messages must be a list"),
    ("messages-text", CHAT, {"messages": "hello"}, 400, "messages must be a list"),
    ("message-text", CHAT, {"messages": ["hello"]}, 400, "messages[0] must be an object"),
    ("no-role", CHAT, {"messages": [{"content": "a"}]}, 400, "messages[0] has no role"),
    ("no-content", CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0] has no content"),
    ("role", CHAT, {"messages": [{"role": "king", "content": "a"}]}, 400, "given 'king'"),
    ("role-list", CHAT, {"messages": [{"role": ["user"], "content": "a"}]}, 400, "role"),
    (
        "image",
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "parts are not supported",
    ),
    ("content-number", CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "must be a text"),
    ("name-number", CHAT, {"messages": [{"role": "user", "content": "a", "name": 3}]}, 400, "name must be a text"),
    ("top-logprobs", CHAT, {"messages": HELLO, "top_logprobs": 3}, 400, "no effect without logprobs=true"),
    ("two-lengths", CHAT, {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, 400, "differ"),
    ("too-many-bytes", COMPLETIONS, {"prompt": "a" * 200_001}, 413, "longer than 200000 bytes"),
    ("no-such-path", "/v1/embeddings", {"input": "a"}, 404, "there is no '/v1/embeddings'"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(PacedScheduler(), max_body=200_000) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "body", "status", "message"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_malformed(server: Served, path: str, body: Any, status: int, message: str, stream: bool) -> None:
    if isinstance(body, dict) and "stream" not in body and "stream_options" not in body:
        body = {**body, "stream": stream}
    found, headers, data = server.call(path, body)
    assert found == status, data
    assert headers["content-type"] == "application/json"
    error = json.loads(data)["error"]
    assert error["type"] == "invalid_request_error"
    assert any(part in error["message"] for part in message.split("|")), error
    assert len(error["message"]) < 1000 and "\n" not in error["message"]
    server.settle()


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types(server: Served, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {"Content-Type": ""}
    status, _, data = server.call(COMPLETIONS, b'{"prompt": "a"}', headers=headers)
    assert status == 415 and "application/json" in json.loads(data)["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods(server: Served, method: str) -> None:
    status, headers, data = server.call(COMPLETIONS, method=method)
    assert status == 405 and headers["allow"] == "POST" and "not allowed" in json.loads(data)["error"]["message"]


@pytest.mark.parametrize(
    "field", ["temperature", "n", "stop", "seed", "logprobs", "tools", "logit_bias", "stream_options"]
)
def test_null_is_as_good_as_absent(server: Served, field: str) -> None:
    assert server.call(COMPLETIONS, {"prompt": "a", "max_tokens": 2, field: None})[0] == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [("frequency_penalty", 0), ("presence_penalty", 0.0), ("best_of", 1), ("logit_bias", {}), ("echo", False)],
)
def test_values_that_ask_for_nothing_are_accepted(server: Served, field: str, value: Any) -> None:
    assert server.call(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "user": "me", field: value})[0] == 200


def test_what_has_no_effect_at_temperature_0_is_accepted(server: Served) -> None:
    body = {"prompt": "a", "temperature": 0, "seed": 3, "top_p": 0.5, "top_k": 4, "min_p": 0.1}
    assert server.call(COMPLETIONS, body)[0] == 200
