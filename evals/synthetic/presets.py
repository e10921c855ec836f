"""Settings of `preset=small`: each separates mixers within minutes of one CPU core per model."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "mqar": {"task": {"length": 64, "n_pairs": [4, 8, 16], "vocab_size": 128}},
    "induction": {"task": {"length": 64, "segment": [8, 24], "vocab_size": 32}},
    "selective_copying": {"task": {"length": 64, "n_data": 8, "vocab_size": 10}},
    "rewrite": {"task": {"length": 40, "n_keys": 4, "n_writes": 16, "vocab_size": 33}},
    "remember": {"task": {"length": 64}},
    "needle": {"task": {"length": 128, "n_digits": 2}},
    "regression": {"task": {"d": 4, "n_points": 16, "noise": 0.1}},
    "ar": {"task": {"d": 4, "q": 2, "length": 32, "d_representation": 8}},
}
"""Task -> keys of SyntheticConfig."""
