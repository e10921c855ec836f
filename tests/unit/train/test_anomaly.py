"""Anomaly decisions, exactly."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from llm.train.anomaly import AnomalyJudge
from llm.train.config import AnomalyConfig

WINDOW = [float(x) for x in (1, 2, 3, 4, 5, 6, 7, 8)]


def filled(**changes: object) -> AnomalyJudge:
    judge = AnomalyJudge(AnomalyConfig(**{"window": 8, "sigma": 2.0, **changes}))  # type: ignore[arg-type]
    for loss in WINDOW:
        assert judge.judge(loss, 1.0) == "ok"
    return judge


@pytest.mark.parametrize("loss, grad_norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
@pytest.mark.parametrize("policy", ["skip", "stop", "rollback"])
def test_values_that_are_not_finite_are_rejected_from_the_first_step(
    loss: float, grad_norm: float, policy: str
) -> None:
    judge = AnomalyJudge(AnomalyConfig(policy=policy))  # type: ignore[arg-type]
    assert judge.judge(loss, grad_norm) == policy
    assert not judge.losses
    assert ("loss" if not math.isfinite(loss) else "gradient norm") in judge.reason


def test_a_spike_is_above_mean_plus_sigma_std_to_the_last_digit() -> None:
    limit = statistics.fmean(WINDOW) + 2.0 * statistics.pstdev(WINDOW)
    assert filled().judge(limit, 1.0) == "ok"
    assert filled().judge(math.nextafter(limit, math.inf), 1.0) == "skip"


def test_gradient_norms_are_judged_by_their_own_window() -> None:
    judge = filled()
    assert judge.judge(4.0, 1.0) == "ok"
    assert judge.judge(4.0, 1.0001) == "skip"
    assert judge.reason.startswith("gradient norm 1.0001 is above 1 ")


def test_nothing_is_a_spike_before_the_window_is_full_or_without_sigma() -> None:
    judge = AnomalyJudge(AnomalyConfig(window=8, sigma=2.0))
    for loss in WINDOW[:7]:
        judge.judge(loss, 1.0)
    assert judge.judge(1e9, 1.0) == "ok"
    assert filled(sigma=None).judge(1e9, 1e9) == "ok"


def test_rejected_values_do_not_enter_the_window() -> None:
    judge = filled()
    before = list(judge.losses)
    judge.judge(1e6, 1.0)
    assert list(judge.losses) == before
    judge.judge(4.0, 1.0)
    assert list(judge.losses) == [*before[1:], 4.0]


def test_too_many_skips_in_a_row_stop() -> None:
    judge = filled(max_skips=3)
    decisions = [judge.judge(math.nan, 1.0) for _ in range(4)]
    assert decisions == ["skip", "skip", "skip", "stop"]
    assert "after 3 skipped steps in a row (train.anomaly.max_skips)" in judge.reason
    assert judge.explain(17).startswith("step 17: loss is nan")


def test_a_good_step_ends_a_row() -> None:
    judge = filled(max_skips=1)
    assert [judge.judge(x, 1.0) for x in (math.nan, 4.0, math.nan, math.nan)] == ["skip", "ok", "skip", "stop"]
    assert judge.num_anomalies == 3


def test_rollbacks_end_only_after_a_good_stretch() -> None:
    judge = filled(policy="rollback", max_skips=2)
    saved = judge.state()

    def roll_back() -> str:
        decision = judge.judge(math.nan, 1.0)
        counters = judge.counters()
        judge.load(saved)
        judge.restore_counters(counters)
        return decision

    assert [roll_back(), roll_back()] == ["rollback", "rollback"]
    judge.judge(4.0, 1.0)
    assert roll_back() == "stop"
    judge = filled(policy="rollback", max_skips=2)
    assert [roll_back(), roll_back()] == ["rollback", "rollback"]
    for _ in range(8):
        judge.judge(4.0, 1.0)
    assert roll_back() == "rollback"


def test_state_survives_json_to_the_bit() -> None:
    judge = filled(max_skips=2)
    judge.judge(0.1 + 0.2, 1.0)
    judge.judge(math.nan, 1.0)
    other = AnomalyJudge(judge.config)
    other.load(json.loads(json.dumps(judge.state())))
    assert other.state() == judge.state()
    for loss in (5.0, 1e9, math.nan, 4.0, 30.0):
        assert other.judge(loss, 1.0) == judge.judge(loss, 1.0)
    assert other.reason == judge.reason
    assert other.state() == judge.state()


def test_events_are_taken_once() -> None:
    judge = filled()
    judge.judge(math.inf, 2.0)
    (event,) = judge.take_events()
    assert event == {"action": "skip", "reason": "loss is inf", "loss": math.inf, "grad_norm": 2.0}
    assert judge.take_events() == []
