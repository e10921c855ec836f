"""Time step: how long a token acts on a recurrent state, and how much of the state is left of it (Mamba-2's gate)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from llm.core.errors import UserError
from llm.core.init import Init

SMALLEST_STEP = 1e-4
SMALLEST_RATE = 1e-2


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 <= low <= high or high == 0:
        raise UserError(f"a range of start values must be [low, high] with 0 <= low <= high and 0 < high, not {value}")
    return value


Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""A config field for a range of positive start values."""


class TimeStep(nn.Module):
    """dt_t = softplus(raw_t + dt_bias), log_decay_t = -exp(a_log) dt_t, per head and always in fp32 or wider.

    dt_bias [H]: dt starts log-uniform in `dt_range` where raw is zero. a_log [H]: rates start uniform in `rate_range`.
    A module of its own, so that a plan can keep just these parameters in fp32.
    """

    def __init__(self, n_heads: int, dt_range: tuple[float, float], rate_range: tuple[float, float]) -> None:
        super().__init__()
        self.dt_range = dt_range
        self.rate_range = rate_range
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.a_log = nn.Parameter(torch.empty(n_heads))

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """raw [B, T, H] -> (dt, log_decay), each [B, T, H]."""
        wide = torch.promote_types(raw.dtype, torch.float32)
        dt = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        return dt, -self.a_log.to(wide).exp() * dt

    def init_spec(self) -> dict[str, Init]:
        return {"dt_bias": self._dt_bias, "a_log": self._a_log}

    def _dt_bias(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """The inverse of softplus at log-uniform steps."""
        low, high = (math.log(max(value, SMALLEST_STEP)) for value in self.dt_range)
        dt = torch.empty(shape).uniform_(low, high, generator=rng).exp()
        return dt + torch.log(-torch.expm1(-dt))

    def _a_log(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        return torch.empty(shape).uniform_(*self.rate_range, generator=rng).clamp(min=SMALLEST_RATE).log()
