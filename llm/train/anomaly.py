"""What to do with a step whose loss or gradient cannot be trusted."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

from llm.train.config import AnomalyConfig

Decision = Literal["ok", "skip", "stop", "rollback"]


class AnomalyJudge:
    """Judges each step by its loss and gradient norm, which are already reduced, so that every rank decides alike.

    An anomaly is a value that is not finite or, with `sigma` set, one above mean + sigma * std of the last `window`
    accepted values (judged once the window is full; std of the population). Rejected values never enter the window.

    skip: the step is left out; after more than `max_skips` in a row the answer is "stop".
    rollback: after more than `max_skips` rollbacks without `window` good steps since, the answer is "stop".
    `reason` says in one line what was wrong with the last rejected step.
    """

    def __init__(self, config: AnomalyConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.grad_norms: deque[float] = deque(maxlen=config.window)
        self.in_a_row = 0
        self.num_anomalies = 0
        self.num_good = 0
        self.reason = ""
        self._events: deque[dict[str, Any]] = deque(maxlen=1000)

    def judge(self, loss: float, grad_norm: float) -> Decision:
        """The decision on a step, before its optimizer update. To be asked exactly once per step."""
        problem = self._problem("loss", loss, self.losses) or self._problem("gradient norm", grad_norm, self.grad_norms)
        if not problem:
            self.losses.append(loss)
            self.grad_norms.append(grad_norm)
            self.num_good += 1
            if self.config.policy == "skip" or self.num_good >= self.config.window:
                self.in_a_row = 0
            return "ok"
        self.num_anomalies += 1
        self.in_a_row += 1
        self.num_good = 0
        decision: Decision = self.config.policy
        self.reason = problem
        if decision != "stop" and self.in_a_row > self.config.max_skips:
            self.reason += f", after {self.config.max_skips} " + (
                "skipped steps in a row" if decision == "skip" else "rollbacks without a good stretch between them"
            )
            self.reason += " (train.anomaly.max_skips)"
            decision = "stop"
        self._events.append({"action": decision, "reason": self.reason, "loss": loss, "grad_norm": grad_norm})
        return decision

    def _problem(self, name: str, value: float, window: deque[float]) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        sigma = self.config.sigma
        if sigma is None or len(window) < self.config.window:
            return ""
        mean = math.fsum(window) / len(window)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
        limit = mean + sigma * std
        if value <= limit:
            return ""
        source = f"mean {mean:.6g} + {sigma:g} * std {std:.6g} of {len(window)} steps"
        return f"{name} {value:.6g} is above {limit:.6g} = {source}"

    def explain(self, step: int) -> str:
        """One line for the user on the step that was rejected last."""
        return f"step {step}: {self.reason}; lower optim.lr, set optim.clip_norm, or look at the data of this step"

    def take_events(self) -> list[dict[str, Any]]:
        """Rejected steps since the last call: action, reason, loss, grad_norm."""
        events = list(self._events)
        self._events.clear()
        return events

    def counters(self) -> dict[str, int]:
        """What must outlast a rollback, which restores everything else: without it one could repeat for ever."""
        return {"in_a_row": self.in_a_row, "num_anomalies": self.num_anomalies, "num_good": self.num_good}

    def restore_counters(self, counters: dict[str, int]) -> None:
        """Take back what `counters` gave."""
        self.in_a_row = counters["in_a_row"]
        self.num_anomalies = counters["num_anomalies"]
        self.num_good = counters["num_good"]

    def state(self) -> dict[str, Any]:
        """The window and the counters, as plain data."""
        return {"losses": list(self.losses), "grad_norms": list(self.grad_norms)} | self.counters()

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.grad_norms = deque(state["grad_norms"], maxlen=self.config.window)
        self.restore_counters(state)
