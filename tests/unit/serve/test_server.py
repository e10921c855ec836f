"""The server's behaviour under load, time-outs, disconnects and failures, at a pace that the test sets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llm.core.errors import UserError
from llm.serve.app import host_name
from llm.serve.server import bind, check_address, is_loopback, read_api_key
from tests.unit.serve.fakes import WAIT, PacedScheduler, Served, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY = "a-key-of-24-characters-x"


@pytest.fixture
def scheduler() -> PacedScheduler:
    return PacedScheduler()


@pytest.fixture
def server(scheduler: PacedScheduler) -> Iterator[Served]:
    with served(scheduler, max_open=4) as found:
        yield found


def in_background(server: Served, body: dict[str, Any], found: list[Any], path: str = COMPLETIONS) -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(server.call(path, body)))
    thread.start()
    return thread


def test_a_completion(server: Served) -> None:
    found = server.json(COMPLETIONS, {"model": "tiny", "prompt": "abc", "max_tokens": 3, "logprobs": 2})
    assert found["object"] == "text_completion" and found["model"] == "tiny" and found["id"].startswith("cmpl-")
    (choice,) = found["choices"]
    assert choice["text"] == "cba" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["c", "b", "a"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["top_logprobs"][0] == {"c": -0.5, "d": -1.5}
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_several_prompts_and_choices_come_in_order(server: Served) -> None:
    found = server.json(COMPLETIONS, {"prompt": ["ab", [99, 100]], "n": 2, "max_tokens": 2})
    assert [(c["index"], c["text"]) for c in found["choices"]] == [(0, "ba"), (1, "ba"), (2, "dc"), (3, "dc")]
    assert found["usage"]["prompt_tokens"] == 3 + 2


@pytest.mark.parametrize(("stop", "text", "reason"), [("b", "c", "stop"), (["x"], "cb", "length"), ("ba", "c", "stop")])
def test_stop_texts(server: Served, stop: Any, text: str, reason: str) -> None:
    body = {"prompt": "abc", "max_tokens": 2 if reason == "length" else 9, "stop": stop, "logprobs": 0}
    (choice,) = server.json(COMPLETIONS, body)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)
    assert "".join(choice["logprobs"]["tokens"]) == text
    chunks = server.stream(COMPLETIONS, body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert sum((chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks), []) == list(text)


def test_the_end_of_the_text(server: Served) -> None:
    (choice,) = server.json(COMPLETIONS, {"prompt": "abc", "max_tokens": 20})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("cba", "stop")


def test_half_characters_are_held_back(server: Served) -> None:
    body = {"prompt": [*"\u00e9\u20ac".encode()][::-1], "max_tokens": 5}
    chunks = server.stream(COMPLETIONS, body)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["\u00e9", "\u20ac"]
    assert server.json(COMPLETIONS, body)["choices"][0]["text"] == "\u00e9\u20ac"


def test_a_chat(server: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]
    body = {"messages": messages, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 1}
    found = server.json(CHAT, body)
    (choice,) = found["choices"]
    assert found["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": ":tn", "refusal": None}
    expected = {"token": ":", "logprob": -0.5, "bytes": [58]}
    assert choice["logprobs"]["content"][0] == {**expected, "top_logprobs": [expected]}
    chunks = server.stream(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[1:-1]) == ":tn"
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], found["usage"])


def test_a_chat_ends_before_the_next_turn(server: Served) -> None:
    found = server.json(CHAT, {"messages": [{"role": "user", "content": ":resU\n!yes"}]})
    assert found["choices"][0]["message"]["content"] == ":tnatsissA\nsey!"
    assert found["choices"][0]["finish_reason"] == "stop"


def test_models_health_and_metrics(server: Served) -> None:
    assert [model["id"] for model in server.json("/v1/models")["data"]] == ["tiny"]
    assert server.json("/v1/models/tiny")["id"] == "tiny"
    assert server.call("/v1/models/other")[0] == 404
    assert server.call("/health")[0] == 200
    server.json(COMPLETIONS, {"prompt": "abc", "max_tokens": 3})
    status, headers, data = server.call("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    lines = data.decode().splitlines()
    assert 'manyformer_requests_total{path="/v1/completions",status="200"} 1.0' in lines
    assert 'manyformer_requests_total{path="other",status="404"} 1.0' in lines
    assert "manyformer_generated_tokens_total 3.0" in lines and "manyformer_prompt_tokens_total 4.0" in lines
    assert "manyformer_prompt_tokens_reused_total 0.0" in lines and "manyformer_drafted_tokens_total 0.0" in lines
    assert "manyformer_running 0.0" in lines and "manyformer_first_token_seconds_count 1.0" in lines


def test_the_page_allows_nothing_from_elsewhere(server: Served) -> None:
    status, headers, data = server.call("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
    text = data.decode()
    assert "http:" not in text and "https:" not in text and " style=" not in text


def test_a_full_queue_is_429(server: Served, scheduler: PacedScheduler) -> None:
    scheduler.pace()
    found: list[Any] = []
    running = [in_background(server, {"prompt": "ab", "n": 2, "max_tokens": 2}, found) for _ in range(2)]
    scheduler.wait_for("submit", 4)
    status, headers, data = server.call(COMPLETIONS, {"prompt": "ab"})
    assert status == 429 and headers["retry-after"] == "1"
    error = json.loads(data)["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    scheduler.permit(100)
    for thread in running:
        thread.join(WAIT)
    assert [status for status, _, _ in found] == [200, 200]
    assert server.call(COMPLETIONS, {"prompt": "ab", "n": 4, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "begun"])
def test_a_disconnect_frees_the_request(server: Served, scheduler: PacedScheduler, stream: bool, begun: bool) -> None:
    scheduler.pace()
    connection = server.open(COMPLETIONS, {"prompt": "ab", "max_tokens": 50, "stream": stream, "n": 3})
    scheduler.wait_for("submit", 3)
    if begun:
        scheduler.permit(2)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    connection.close()
    scheduler.wait_for("cancel", 3)
    server.settle()
    assert (scheduler.n_running, scheduler.n_waiting) == (0, 0)
    lines = server.call("/metrics")[2].decode().splitlines()
    assert 'manyformer_requests_total{path="/v1/completions",status="disconnected"} 1.0' in lines
    assert "manyformer_cancelled_total 3.0" in lines


def test_a_request_that_takes_too_long(scheduler: PacedScheduler) -> None:
    scheduler.pace()
    with served(scheduler, request_timeout=0.2) as server:
        status, _, data = server.call(COMPLETIONS, {"prompt": "ab"})
        assert status == 504 and json.loads(data)["error"]["code"] == "timeout"
        scheduler.wait_for("cancel")
        scheduler.permit(1)
        _, _, data = server.call(COMPLETIONS, {"prompt": "ab", "stream": True})
        events = [json.loads(event.removeprefix("data: ")) for event in data.decode().strip().split("\n\n")]
        assert events[0]["choices"][0]["text"] == "b" and events[-1]["error"]["code"] == "timeout"
        scheduler.wait_for("cancel", 2)
        server.settle()


def test_a_body_that_does_not_arrive(scheduler: PacedScheduler) -> None:
    with served(scheduler, body_timeout=0.2) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_body_of_unknown_length_is_cut_off(scheduler: PacedScheduler) -> None:
    with served(scheduler, max_body=1000) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            connection.sendall(b"400\r\n" + b"a" * 1024 + b"\r\n")
            assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_failed_model_is_told_and_ends_the_server(
    scheduler: PacedScheduler, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(scheduler) as server:
        scheduler.fail = True
        status, _, data = server.call(COMPLETIONS, {"prompt": "ab"})
        assert status == 503 and json.loads(data)["error"]["code"] == "engine_failed"
        server.thread.join(WAIT)
        assert server.ended == [False]
    assert "the device is gone" in capfd.readouterr().err


def test_the_key(scheduler: PacedScheduler) -> None:
    with served(scheduler, api_key=KEY) as server:
        assert server.call("/health")[0] == 200 and server.call("/")[0] == 200
        for path in ("/v1/models", "/metrics", "/docs"):
            for header in (
                {},
                {"Authorization": f"Bearer {KEY}x"},
                {"Authorization": KEY},
                {"Authorization": "Bearer "},
            ):
                status, headers, data = server.call(path, headers=header)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
                assert json.loads(data)["error"]["code"] == "invalid_api_key" and KEY not in data.decode()
        assert server.call("/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
        assert server.call(COMPLETIONS, {"prompt": "a"})[0] == 401


def test_names_of_others_do_not_reach_a_server_of_this_machine(scheduler: PacedScheduler) -> None:
    with served(scheduler, hosts=frozenset({"localhost", "127.0.0.1", "[::1]"})) as server:
        assert server.call("/health")[0] == 200
        assert server.call("/health", headers={"Host": f"localhost:{server.port}"})[0] == 200
        status, _, data = server.call("/v1/models", headers={"Host": "evil.example"})
        assert status == 403 and json.loads(data)["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    ("header", "name"),
    [("localhost:8000", "localhost"), ("[::1]:80", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("a:b:c", ""), ("", "")],
)
def test_host_names(header: str, name: str) -> None:
    assert host_name(header) == name


def test_addresses() -> None:
    for host in ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        check_address(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", "", "127.0.0.1.example.org"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="there is no API key"):
            check_address(host, None)
        check_address(host, KEY)


def test_keys(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYFORMER_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("MANYFORMER_API_KEY", KEY)
    assert read_api_key(None) == KEY
    file = tmp_path / "key"
    file.write_text(f"{KEY}{KEY}\n")
    assert read_api_key(str(file)) == KEY + KEY
    for bad in ("short", "with a blank in the middle", "k\u00e9y" * 10):
        file.write_text(bad)
        with pytest.raises(UserError, match="at least 16 printable ASCII"):
            read_api_key(str(file))
    with pytest.raises(UserError, match="cannot read the API key"):
        read_api_key(str(tmp_path / "absent"))


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as listener:
        with pytest.raises(UserError, match="choose another"):
            bind("127.0.0.1", listener.getsockname()[1])
