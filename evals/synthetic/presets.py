"""Settings of `preset=small`: each separates mixers within minutes of one CPU core per model."""

from __future__ import annotations

from typing import Any

# Recall needs each token to see the one before it: a layer that all models have gives them that, so that what is
# compared is how well pairs are kept and found again.
PREVIOUS_TOKEN = {"mixer": {"type": "attention", "n_heads": 2, "window": 2}, "channel": None}

SMALL: dict[str, dict[str, Any]] = {
    "mqar": {
        "task": {"length": 64, "n_pairs": [4, 8, 16], "vocab_size": 65},
        "model": {
            "layers": [
                {"pattern": [PREVIOUS_TOKEN, {"mixer": "attention", "channel": {"type": "swiglu", "d_hidden": 128}}]}
            ],
            "position": "none",
        },
        "train": {"optimizer": "muon", "lr": 0.005, "adam_lr": 3e-3, "steps": 600},
    },
    "induction": {"task": {"length": 64, "segment": [8, 24], "vocab_size": 32}},
    "selective_copying": {"task": {"length": 64, "n_data": 8, "vocab_size": 10}},
    "rewrite": {"task": {"length": 40, "n_keys": 4, "n_writes": 16, "vocab_size": 33}},
    "remember": {"task": {"length": 64}},
    "needle": {"task": {"length": 128, "n_digits": 2}},
    "regression": {"task": {"d": 4, "n_points": 16, "noise": 0.1}},
    "ar": {"task": {"d": 4, "q": 2, "length": 32, "d_representation": 8}},
}
"""Task -> keys of SyntheticConfig."""
