"""The HTTP side: routes, bodies, streams, time-outs and disconnects. starlette is imported where it is used."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.serve.answer import Answer, ChatAnswer, CompletionAnswer
from llm.serve.errors import ApiError
from llm.serve.metrics import Metrics
from llm.serve.request import ChatRequest, CompletionRequest, GenerationRequest
from llm.serve.service import Service
from llm.serve.worker import Job, Ticket

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PAGE = Path(__file__).with_name("page.html")
OPEN_PATHS = ("/", "/health")
"""Paths that need no API key: they tell nothing of the model."""

_JSON = [(b"content-type", b"application/json")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


def create_app(
    service: Service, metrics: Metrics, *, api_key: str | None = None, hosts: frozenset[str] | None = None
) -> App:
    """The ASGI application. api_key: what clients must send; hosts: names by which they may address the server (None:
    any), which keeps web pages of others from reaching a server on this machine through a name of their own."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = PAGE.read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": content_security_policy(page), "Cache-Control": "no-cache"}

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=page_headers)

    async def health(request: Request) -> Response:
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, status_code=200 if alive else 503)

    async def show_metrics(request: Request) -> Response:
        content, kind = metrics.text()
        return Response(content, headers={"Content-Type": kind})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.model_card]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(service.model_card)

    async def completions(request: Request) -> Response:
        return await _generate(service, metrics, request, CompletionRequest, CompletionAnswer)

    async def chat_completions(request: Request) -> Response:
        return await _generate(service, metrics, request, ChatRequest, ChatAnswer)

    async def on_error(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(
                error.status_code, _http_message(request, error.status_code), headers=_plain(error.headers)
            )
        if not isinstance(error, ApiError):
            error = ApiError(500, "internal error; see the server's log", code="internal_error")
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    routes = [
        Route("/", index),
        Route("/health", health),
        Route("/metrics", show_metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: on_error, HTTPException: on_error, Exception: on_error},
    )
    app.router.redirect_slashes = False
    return _counted(_guarded(app, api_key, hosts), metrics, {route.path for route in routes})


async def _generate(
    service: Service,
    metrics: Metrics,
    request: Request,
    kind: type[GenerationRequest],
    answer: type[Answer],
) -> Response:
    given = kind.read(await _body(request, service))
    jobs = await service.jobs(given)
    return _Generation(service, metrics, answer(service, given, jobs), jobs)  # type: ignore[return-value]


async def _body(request: Request, service: Service) -> bytes:
    """The bytes of a request's JSON; ApiError when there are too many, or they take too long to come."""
    from starlette.requests import ClientDisconnect

    limits = service.limits
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be JSON; send Content-Type: application/json (given {kind[:100]!r})")
    too_long = ApiError(413, f"the body is longer than {limits.max_body} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.max_body:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body:
                    raise too_long
    except ClientDisconnect as error:
        raise ApiError(400, "the client went away before its request was complete") from error
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {limits.body_timeout:g} s") from error
    return bytes(body)


class _Generation:
    """A response that runs the jobs, in one object or as a stream, and ends them when the client goes away."""

    def __init__(self, service: Service, metrics: Metrics, answer: Answer, jobs: list[Job]) -> None:
        self.service, self.metrics, self.answer = service, metrics, answer
        self.began = time.perf_counter()
        self.jobs = jobs
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.service.limits.request_timeout
        ticket = self.service.worker.submit(self.jobs)
        self.metrics.prompt_tokens.inc(self.answer.n_prompt_tokens)
        stream = self.answer.given.stream
        producer = asyncio.ensure_future((self._stream if stream else self._whole)(ticket, send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({producer, watcher}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if producer.done():
                error = producer.exception()
            elif watcher.done():
                return
            else:
                error = ApiError(504, f"no complete answer within {limit:g} s", code="timeout")
        finally:
            self.service.worker.cancel(ticket)
            for task in (producer, watcher):
                task.cancel()
            await asyncio.gather(producer, watcher, return_exceptions=True)
        if error is None or isinstance(error, OSError):
            return
        if not self.started or not isinstance(error, ApiError):
            raise error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await send(_part(_event(error.body()), more=False))

    async def _whole(self, ticket: Ticket, send: Send) -> None:
        while not self.answer.complete:
            await self._next(ticket)
        body = _dump(self.answer.whole())
        self.started = True
        headers = [*_JSON, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(_part(body, more=False))

    async def _stream(self, ticket: Ticket, send: Send) -> None:
        answer = self.answer
        while not answer.complete:
            index, piece = await self._next(ticket)
            events = b"" if self.started else b"".join(map(_event, answer.opening()))
            if not self.started:
                self.started = True
                await send({"type": "http.response.start", "status": 200, "headers": _SSE})
            await send(_part(events + _event(answer.chunk(index, piece))))
        await send(_part(b"".join(map(_event, answer.closing())) + b"data: [DONE]\n\n", more=False))

    async def _next(self, ticket: Ticket) -> tuple[int, Any]:
        first = not any(self.answer.n_tokens)
        index, piece = await ticket.get()
        if first:
            self.metrics.first_token.observe(time.perf_counter() - self.began)
        self.answer.add(index, piece)
        return index, piece


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"


def _part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _guarded(app: App, api_key: str | None, hosts: frozenset[str] | None) -> App:
    """Lets through what addresses this server by its name and knows the key."""
    wanted = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        error: ApiError | None = None
        if hosts is not None and host_name(headers.get(b"host", b"").decode("latin-1")) not in hosts:
            error = ApiError(403, "this server answers only to its own address; see the Host header", code="wrong_host")
        elif wanted is not None and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            digest = hashlib.sha256(given.strip()).digest()
            if not hmac.compare_digest(digest, wanted) or kind.lower() != b"bearer":
                error = ApiError(
                    401,
                    "missing or wrong API key; send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if error is None:
            await app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        await JSONResponse(error.body(), error.status, headers=error.headers)(scope, receive, send)

    return guard


def _counted(app: App, metrics: Metrics, paths: set[str]) -> App:
    """Counts requests by path and status, and their time."""

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began = time.perf_counter()
        status = "disconnected"
        code = ""

        async def note(message: MutableMapping[str, Any]) -> None:
            nonlocal status, code
            if message["type"] == "http.response.start":
                code = str(message["status"])
                message = {**message, "headers": [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                status = code

        path = scope["path"] if scope["path"] in paths else "other"
        try:
            await app(scope, receive, note)
        finally:
            metrics.requests.labels(path, status).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - began)

    return count


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?", host.strip().lower())
    return found[1] if found else ""


def content_security_policy(page: str) -> str:
    """A policy under which the page's own script and style run, and nothing is loaded from elsewhere."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _http_message(request: Request, status: int) -> str:
    if status == 404:
        return f"there is no {request.url.path[:200]!r} here; see /v1/completions, /v1/chat/completions, /v1/models"
    if status == 405:
        return f"{request.method[:20]} is not allowed for {request.url.path}"
    return f"the request cannot be answered (status {status})"


def _plain(headers: Any) -> dict[str, str]:
    return dict(headers or {})
