"""The thread that owns the model. The event loop gives it work and gets pieces of text; neither waits for the other.

Methods without an underscore are for the event loop's thread, but for `start`, which is called before it goes.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from llm.core.errors import UserError
from llm.generate.events import Speculation, TokenEvent
from llm.generate.sampling import Sampling
from llm.serve.errors import ApiError, bad_request
from llm.serve.output import Output, Piece


class SchedulerLike(Protocol):
    """What the thread needs of `llm.generate.scheduler.Scheduler`."""

    n_prompt_read: int
    n_prompt_reused: int

    @property
    def speculation(self) -> Speculation: ...

    @property
    def n_running(self) -> int: ...

    @property
    def n_waiting(self) -> int: ...

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Callable[[int], bool] | None = None,
        n_logprobs: int | None = None,
    ) -> int: ...

    def cancel(self, request: int) -> None: ...

    def step(self) -> list[TokenEvent]: ...

    def state_bytes(self) -> int: ...

    def prefix_cache_bytes(self) -> int: ...


@dataclass(frozen=True)
class Job:
    """One output that is wanted."""

    prompt: Sequence[int]
    sampling: Sampling
    n_logprobs: int | None = None
    end_ids: frozenset[int] = frozenset()


@dataclass(eq=False)
class Ticket:
    """The outputs of one request. `get` gives (index of the job, piece) as they come; every output ends with a piece
    that says why."""

    n_outputs: int
    n_open: int
    arrived: asyncio.Queue[tuple[int, Piece] | ApiError] = field(default_factory=asyncio.Queue)
    running: dict[int, tuple[int, Output]] = field(default_factory=dict)
    cancelled: bool = False

    async def get(self) -> tuple[int, Piece]:
        """The next piece; ApiError when the request has been refused or the worker has failed."""
        found = await self.arrived.get()
        if isinstance(found, ApiError):
            raise found
        return found


class Worker:
    """Runs a scheduler in a thread of its own.

    pieces: bytes of each token. max_open: outputs that may run or wait; more are refused with 429. on_failure: called
    in the event loop when the scheduler has raised; nothing is answered after that.
    """

    def __init__(
        self,
        scheduler: SchedulerLike,
        pieces: Sequence[bytes],
        *,
        max_open: int,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.pieces = pieces
        self.max_open = max_open
        self.on_failure = on_failure
        self.failed = False
        self.n_open = 0
        self.n_cancelled = 0
        self.n_generated = 0
        self.state_bytes = self.prefix_cache_bytes = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: set[Ticket] = set()
        self._going: dict[int, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to work for an event loop."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the forward that it is in."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and not self.failed

    def reserve(self, n: int) -> None:
        """Take places for n outputs; ApiError 429 when there are too few, 503 when the worker has failed."""
        if not self.alive:
            raise _failed()
        if self.n_open + n > self.max_open:
            raise ApiError(
                429,
                f"the server is busy: {self.n_open} texts run or wait, at most {self.max_open} may; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.n_open += n

    def release(self, n: int) -> None:
        """Give reserved places back."""
        self.n_open -= n

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Start jobs for which places are reserved; they free them as they end."""
        ticket = Ticket(len(jobs), len(jobs))
        self._tickets.add(ticket)
        self._commands.put(lambda: self._submit(ticket, jobs))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what is still going of a request. Its memory is free before the next forward."""
        if ticket.n_open and not ticket.cancelled:
            ticket.cancelled = True
            self._commands.put(lambda: self._cancel(ticket))

    def _run(self) -> None:
        try:
            while True:
                busy = self.scheduler.n_running + self.scheduler.n_waiting > 0
                try:
                    command = self._commands.get(block=not busy)
                except queue.Empty:
                    self._step()
                    continue
                if command is None:
                    return
                command()
        except Exception:
            traceback.print_exc()
            self._to_loop(self._fail)

    def _step(self) -> None:
        news: list[tuple[Ticket, int, Piece]] = []
        n_running = self.scheduler.n_running
        events = self.scheduler.step()
        self.n_generated += len(events)
        for event in events:
            ticket = self._going[event.request]
            index, output = ticket.running[event.request]
            piece = output.take(event)
            if event.finish is not None:
                del self._going[event.request], ticket.running[event.request]
            if piece is not None:
                news.append((ticket, index, piece))
        if self.scheduler.n_running != n_running or any(event.finish for event in events):
            self._look_at_memory()
        if news:
            self._to_loop(lambda: self._hand_out(news))

    def _submit(self, ticket: Ticket, jobs: Sequence[Job]) -> None:
        for index, job in enumerate(jobs):
            output = Output(self.pieces, job.sampling.stop, job.end_ids)
            try:
                request = self.scheduler.submit(job.prompt, job.sampling, stop=output.stop, n_logprobs=job.n_logprobs)
            except UserError as error:
                self._drop(ticket)
                self._to_loop(partial(self._refuse, ticket, bad_request(str(error))))
                return
            self._going[request] = ticket
            ticket.running[request] = (index, output)

    def _cancel(self, ticket: Ticket) -> None:
        n = len(ticket.running)
        self._drop(ticket)
        self._look_at_memory()
        self._to_loop(lambda: self._close(ticket, n))

    def _look_at_memory(self) -> None:
        self.state_bytes = self.scheduler.state_bytes()
        self.prefix_cache_bytes = self.scheduler.prefix_cache_bytes()

    def _drop(self, ticket: Ticket) -> None:
        for request in ticket.running:
            self.scheduler.cancel(request)
            del self._going[request]
        ticket.running.clear()

    def _to_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            # The loop has been closed: nobody waits any more.
            return

    def _hand_out(self, news: Sequence[tuple[Ticket, int, Piece]]) -> None:
        for ticket, index, piece in news:
            if piece.finish is not None:
                self._free(ticket, 1)
            ticket.arrived.put_nowait((index, piece))

    def _refuse(self, ticket: Ticket, error: ApiError) -> None:
        self._free(ticket, ticket.n_open)
        ticket.arrived.put_nowait(error)

    def _close(self, ticket: Ticket, n: int) -> None:
        self._free(ticket, n)
        self.n_cancelled += n

    def _free(self, ticket: Ticket, n: int) -> None:
        ticket.n_open -= n
        self.n_open -= n
        if ticket.n_open == 0:
            self._tickets.discard(ticket)

    def _fail(self) -> None:
        self.failed = True
        for ticket in list(self._tickets):
            self._refuse(ticket, _failed())
        if self.on_failure is not None:
            self.on_failure()


def _failed() -> ApiError:
    return ApiError(503, "the model has failed and the server is stopping; see its log", code="engine_failed")
