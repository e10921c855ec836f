"""Learning-rate factors at points that can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from llm.train.config import ScheduleConfig
from llm.train.optim.schedule import lr_factor

TOTAL, STEP = 1000, 10


def factors(**settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    return [lr_factor(schedule, tokens, TOTAL, STEP) for tokens in range(0, TOTAL, STEP)]


def at(tokens: int, **settings: object) -> float:
    return lr_factor(ScheduleConfig.model_validate(settings), tokens, TOTAL, STEP)


def test_warmup_counts_the_steps_own_tokens() -> None:
    values = factors(type="constant", warmup_tokens=50)
    assert values[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert set(values[5:]) == {1.0}


def test_fraction_is_of_the_whole_run() -> None:
    assert factors(type="constant", warmup_fraction=0.05) == factors(type="constant", warmup_tokens=50)


def test_cosine() -> None:
    settings = {"type": "cosine", "warmup_tokens": 200, "min_ratio": 0.1}
    assert at(200, **settings) == 1.0
    assert at(600, **settings) == pytest.approx(0.55)
    assert at(400, **settings) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert at(1000, **settings) == pytest.approx(0.1)
    assert at(5000, **settings) == pytest.approx(0.1)


def test_linear() -> None:
    settings = {"type": "linear", "min_ratio": 0.0}
    assert [at(tokens, **settings) for tokens in (0, 250, 990, 1000)] == pytest.approx([1.0, 0.75, 0.01, 0.0])


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd(shape: str, half: float) -> None:
    settings = {"type": "wsd", "warmup_tokens": 100, "decay_tokens": 400, "min_ratio": 0.0, "decay_shape": shape}
    assert at(100, **settings) == at(350, **settings) == at(600, **settings) == 1.0
    assert at(800, **settings) == pytest.approx(half)
    assert at(1000, **settings) == pytest.approx(0.0)


def test_wsd_decays_over_a_fifth_by_default() -> None:
    assert at(800, type="wsd") == 1.0
    assert at(900, type="wsd", min_ratio=0.2) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_never_rises_after_warmup(kind: str) -> None:
    values = factors(type=kind, warmup_tokens=100)
    assert all(later <= earlier for earlier, later in zip(values[10:], values[11:]))
    assert 0.1 <= min(values[10:]) < 0.2


def test_does_not_depend_on_the_size_of_steps_after_warmup() -> None:
    schedule = ScheduleConfig(type="cosine")
    assert lr_factor(schedule, 400, TOTAL, 10) == lr_factor(schedule, 400, TOTAL, 100)


def test_warmup_longer_than_the_run() -> None:
    assert at(990, type="cosine", warmup_tokens=2000) == pytest.approx(0.5)
