"""A scheduler whose pace the test sets, and a server around it in this process."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.data.tokenizer.simple import BytesTokenizer
from llm.generate.chat import load_chat
from llm.generate.events import Speculation, TokenEvent
from llm.generate.sampling import Sampling
from llm.serve.app import create_app
from llm.serve.config import Limits
from llm.serve.metrics import Metrics
from llm.serve.server import bind, serve
from llm.serve.service import Service
from llm.serve.worker import SchedulerLike, Worker

WAIT = 60.0
"""Seconds that a test waits for an event before it fails."""


class PacedScheduler:
    """Says each prompt backwards, over and over, one token a step; a step needs a permit once `pace` has been called.

    steps: waits for permits. log: what happened to which request.
    """

    def __init__(self, max_batch: int = 2) -> None:
        self.max_batch = max_batch
        self.log: list[tuple[str, int]] = []
        self.changed = threading.Condition()
        self.fail = False
        self.n_prompt_read = self.n_prompt_reused = 0
        self.speculation = Speculation()
        self._permits: threading.Semaphore | None = None
        self._waiting: deque[int] = deque()
        self._running: list[int] = []
        self._given: dict[int, tuple[list[int], Sampling, Any, int | None]] = {}
        self._made: dict[int, int] = {}

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def state_bytes(self) -> int:
        return 100 * len(self._running)

    def prefix_cache_bytes(self) -> int:
        return 0

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Callable[[int], bool] | None = None,
        n_logprobs: int | None = None,
    ) -> int:
        if min(prompt) < 0 or max(prompt) > 256:
            raise UserError(f"prompt 0 holds token id {max(prompt)}; the model's ids are 0 to 256")
        request = len(self._given)
        self._given[request] = (list(prompt), sampling, stop, n_logprobs)
        self._made[request] = 0
        self._waiting.append(request)
        self._note("submit", request)
        return request

    def cancel(self, request: int) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
        self._note("cancel", request)

    def step(self) -> list[TokenEvent]:
        if self._permits is not None and not self._permits.acquire(timeout=0.01):
            return []
        if self.fail:
            raise RuntimeError("the device is gone")
        while self._waiting and len(self._running) < self.max_batch:
            self._running.append(self._waiting.popleft())
        events = []
        for request in list(self._running):
            prompt, sampling, stop, n_logprobs = self._given[request]
            token = prompt[::-1][self._made[request] % len(prompt)]
            self._made[request] += 1
            finish = None
            if token == 256 and not sampling.ignore_eos:
                finish = "eos"
            elif stop is not None and stop(token):
                finish = "stop"
            elif self._made[request] == sampling.max_new_tokens:
                finish = "length"
            if finish:
                self._running.remove(request)
                self._note("finish", request)
            top = tuple(((token + i) % 256, -0.5 - i) for i in range(n_logprobs or 0))
            events.append(TokenEvent(request, token, finish, None if n_logprobs is None else -0.5, top))
        return events

    def pace(self) -> None:
        """From now on a step needs a permit."""
        self._permits = threading.Semaphore(0)

    def permit(self, n: int = 1) -> None:
        """Let n steps pass."""
        assert self._permits is not None
        self._permits.release(n)

    def wait_for(self, what: str, n: int = 1) -> None:
        """Until `what` has happened n times."""
        with self.changed:
            assert self.changed.wait_for(lambda: sum(name == what for name, _ in self.log) >= n, WAIT), (what, self.log)

    def _note(self, what: str, request: int) -> None:
        with self.changed:
            self.log.append((what, request))
            self.changed.notify_all()


@dataclass
class Served:
    """A running server. ended: what `serve` returned."""

    port: int
    service: Service
    app: Any
    thread: threading.Thread
    ended: list[bool]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, path: str, body: Any = None, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {} if data is None else {"Content-Type": "application/json"}
        connection.request(method or ("GET" if data is None else "POST"), path, data, {**sent, **(headers or {})})
        response = connection.getresponse()
        found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return found

    def json(self, path: str, body: Any = None, **options: Any) -> Any:
        """The object that a request is answered with."""
        return json.loads(self.call(path, body, **options)[2])

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The chunks of a streamed answer, which must end with [DONE]."""
        _, headers, data = self.call(path, {**body, "stream": True})
        assert headers["content-type"].startswith("text/event-stream"), data
        events = data.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def open(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection over which a request was sent, and nothing read."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def settle(self) -> None:
        """Until nothing is open."""
        done = threading.Event()
        loop = self.service.worker._loop
        assert loop is not None

        async def watch() -> None:
            while self.service.worker.n_open:
                await asyncio.sleep(0.005)
            done.set()

        asyncio.run_coroutine_threadsafe(watch(), loop)
        assert done.wait(WAIT), self.service.worker.n_open


@contextmanager
def served(
    scheduler: SchedulerLike,
    *,
    tokenizer: Tokenizer | None = None,
    context: int = 64,
    max_open: int = 8,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
    **limits: Any,
) -> Iterator[Served]:
    """A server on a free port of this machine, for as long as the block lasts."""
    tokenizer = tokenizer or BytesTokenizer()
    worker = Worker(scheduler, tokenizer.pieces, max_open=max_open)
    checked = Limits.model_validate({"shutdown_timeout": 1, **limits})
    service = Service(worker, tokenizer, load_chat(tokenizer), "tiny", context, checked)
    app = create_app(service, Metrics(worker), api_key=api_key, hosts=hosts)
    listener = bind("127.0.0.1", 0)
    ended: list[bool] = []
    stop: list[Callable[[], None]] = []
    ready = threading.Event()

    def run() -> None:
        ended.append(serve(app, service, listener, ready=lambda end: (stop.append(end), ready.set())))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(WAIT)
    try:
        yield Served(listener.getsockname()[1], service, app, thread, ended)
    finally:
        stop[0]()
        thread.join(WAIT)
        assert not thread.is_alive()
