"""The load test in short, and that it sees a wrong answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from evals import serve_load
from evals.serve_load import LoadConfig, crowd, expected_texts, make_requests, metric, write_tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("load") / "tiny")


def test_a_small_crowd(run: Path) -> None:
    config = LoadConfig(clients=20, seconds=3, n_requests=16, max_batch=4, leave=0.3)
    record = asyncio.run(crowd(config, run))
    assert record["first_errors"] == []
    assert (record["lost"], record["mixed_up"]) == (0, 0)
    assert record["answers"] > record["streamed"] > 0 and record["left"] > 0 and record["cancelled"] > 0
    assert (record["running_at_end"], record["state_bytes_at_end"]) == (0, 0)


def test_a_wrong_answer_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoadConfig(clients=2, seconds=0.5, n_requests=2, leave=0)
    monkeypatch.setattr(serve_load, "expected_texts", lambda *_: ["something", "else"])
    record = asyncio.run(crowd(config, run))
    assert record["mixed_up"] == record["answers"] > 0 and not record["ok"]


def test_requests_differ(run: Path) -> None:
    requests = make_requests(LoadConfig(n_requests=32))
    texts = expected_texts(run, requests)
    assert len(set(texts)) > 24


def test_metrics_are_read() -> None:
    assert metric("# HELP a b\na_total 3.0\na 2.0\n", "a") == 2.0
