"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._worker = worker
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "manyformer_requests",
            "HTTP requests by path and status; disconnected: the client went away before its answer was complete",
            ["path", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter("manyformer_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.seconds = Histogram(
            "manyformer_request_seconds",
            "Seconds from a request's arrival to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "manyformer_first_token_seconds",
            "Seconds from a request's arrival to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterable[Any]:
        """What the worker counts, read when it is asked for."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        worker, scheduler = self._worker, self._worker.scheduler
        yield CounterMetricFamily("manyformer_generated_tokens", "Tokens generated", worker.n_generated)
        yield CounterMetricFamily("manyformer_cancelled", "Outputs that were ended early", worker.n_cancelled)
        yield GaugeMetricFamily("manyformer_running", "Outputs in the batch", scheduler.n_running)
        yield GaugeMetricFamily("manyformer_waiting", "Outputs that wait for a place", scheduler.n_waiting)
        yield GaugeMetricFamily("manyformer_state_bytes", "Bytes of states, the prefix cache's too", worker.state_bytes)
        yield GaugeMetricFamily(
            "manyformer_prefix_cache_bytes", "Bytes of pages kept for later prompts", worker.prefix_cache_bytes
        )
        tokens = (
            ("prompt_tokens_read", "Tokens of prompts that the model read", scheduler.n_prompt_read),
            ("prompt_tokens_reused", "Tokens of prompts that were read before", scheduler.n_prompt_reused),
            ("drafted_tokens", "Tokens drafted", scheduler.speculation.n_drafted),
            ("accepted_tokens", "Drafted tokens that were kept", scheduler.speculation.n_accepted),
        )
        for name, about, n in tokens:
            yield CounterMetricFamily(f"manyformer_{name}", about, n)

    def text(self) -> tuple[bytes, str]:
        """(the page, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
