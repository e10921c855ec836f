"""The comparison of servers with and without shared prefixes, in short."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx2")

from evals.prefix_reuse import ReuseConfig, measure, prompts


@pytest.mark.slow
def test_a_small_comparison() -> None:
    config = ReuseConfig(system=64, question=8, answer=4, rounds=3, clients=2, n_layers=1, d_model=32)
    record = measure(config)
    assert (record["answers"], record["answers_that_differ"], record["ok"]) == (6, 0, True)
    n_read, n_reused = (record["shared"][key] for key in ("prompt_tokens_read", "prompt_tokens_reused"))
    assert n_reused >= 5 * 64 and record["whole"]["prompt_tokens_reused"] == 0
    assert n_read + n_reused == record["whole"]["prompt_tokens_read"]
    assert record["shared"]["first_token_seconds_median"] > 0


def test_prompts_share_their_beginning_alone() -> None:
    asked = [text for each in prompts(ReuseConfig(system=20, question=9, rounds=2, clients=3)) for text in each]
    assert len({text[:20] for text in asked}) == 1 and len({text[20:] for text in asked}) == 6
