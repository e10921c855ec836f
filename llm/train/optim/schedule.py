"""Learning-rate schedules as a pure function of tokens, so that they do not depend on batch size or world size."""

from __future__ import annotations

import math

from llm.train.config import ScheduleConfig

WSD_DECAY_FRACTION = 0.2
"""Length of the decay of `wsd` when the config gives none."""


def lr_factor(schedule: ScheduleConfig, tokens: int, total_tokens: int, step_tokens: int) -> float:
    """Factor on the peak learning rate for the step that takes `step_tokens` tokens after `tokens` were seen.

    Warm-up rises linearly and counts the step's own tokens, so the first step is not at zero. Decay goes from 1 to
    `min_ratio` and counts the tokens before the step, so the last step is still above `min_ratio`; past `total_tokens`
    it stays there. Decay begins where warm-up ends, for `wsd` at `total_tokens` less the decay length.
    """
    warmup = warmup_tokens(schedule, total_tokens)
    rise = min(1.0, (tokens + step_tokens) / warmup) if warmup else 1.0
    length = decay_tokens(schedule, total_tokens)
    start = total_tokens - length
    progress = min(1.0, max(0.0, tokens - start) / length) if length else float(tokens >= total_tokens)
    return rise * _decayed(schedule, progress)


def warmup_tokens(schedule: ScheduleConfig, total_tokens: int) -> int:
    """Tokens over which the learning rate rises."""
    if schedule.warmup_tokens is not None:
        return schedule.warmup_tokens
    return round((schedule.warmup_fraction or 0.0) * total_tokens)


def decay_tokens(schedule: ScheduleConfig, total_tokens: int) -> int:
    """Tokens over which the learning rate falls, the last ones of the run."""
    after_warmup = max(0, total_tokens - warmup_tokens(schedule, total_tokens))
    if schedule.type != "wsd":
        return after_warmup
    if schedule.decay_tokens is not None:
        return min(schedule.decay_tokens, after_warmup)
    fraction = WSD_DECAY_FRACTION if schedule.decay_fraction is None else schedule.decay_fraction
    return min(round(fraction * total_tokens), after_warmup)


def _decayed(schedule: ScheduleConfig, progress: float) -> float:
    if schedule.type == "constant":
        return 1.0
    shape = {"cosine": "cosine", "linear": "linear", "wsd": schedule.decay_shape}[schedule.type]
    if shape == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif shape == "sqrt":
        left = 1.0 - math.sqrt(progress)
    else:
        left = 1.0 - progress
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * left
