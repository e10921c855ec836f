"""A server's life: the address, the key, the threads, and an orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm.core.errors import UserError
from llm.serve.service import Service

if TYPE_CHECKING:
    from llm.serve.app import App

KEY_VARIABLE = "MANYFORMER_API_KEY"
MIN_KEY_LENGTH = 16

Ready = Callable[[Callable[[], None]], object]


def require_libraries() -> None:
    """UserError unless the libraries of the extra `serve` are there."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'manyformer[serve]'") from error


def read_api_key(file: str | None) -> str | None:
    """The key in a file, else that in MANYFORMER_API_KEY, else None. It never stands on a command line, which every
    user of the machine can read."""
    if file is None:
        key, source = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
        if not key:
            return None
    else:
        source = file
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the API key in {file}: {error}") from error
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"the API key in {source} must have at least {MIN_KEY_LENGTH} printable ASCII characters without blanks"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone. Names other than localhost count as reachable."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_address(host: str, api_key: str | None) -> None:
    """UserError for an address that others can reach, unless there is a key."""
    if api_key is None and not is_loopback(host):
        raise UserError(
            f"host={host} can be reached from other machines, and there is no API key; set {KEY_VARIABLE} or "
            "--api-key-file FILE, or serve on host=127.0.0.1"
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another with host= or port=") from error


def url_of(listener: socket.socket) -> str:
    """The address of a server as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: App, service: Service, listener: socket.socket, *, ready: Ready | None = None) -> bool:
    """Answer requests until SIGINT or SIGTERM, or until the model fails: whether it ended without a failure. ready is
    called when the server is about to answer, with a function that ends it."""
    import uvicorn

    limits = service.limits
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.max_connections,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=limits.shutdown_timeout,
        )
    )

    def end() -> None:
        server.should_exit = True

    async def run() -> None:
        service.worker.on_failure = end
        service.worker.start(asyncio.get_running_loop())
        if ready is not None:
            ready(end)
        await server.serve(sockets=[listener])

    try:
        asyncio.run(run())
    finally:
        service.worker.stop()
    return not service.worker.failed
