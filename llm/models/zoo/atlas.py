"""ATLAS: the published shapes. Feed-forward width, window, chunk and feature map were never published, nor any exact
count: those are choices of ours, and so are the counts."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.facts import Facts


def _atlas(d_model: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    mixer = {"type": "test_time_memory", "preset": "atlas", "n_heads": n_heads}
    return {
        "vocab_size": 32_128,
        "d_model": d_model,
        "max_seq_len": 4096,
        "layers": [{"pattern": [{"mixer": mixer, "channel": "swiglu"}], "repeat": n_layers}],
        "position": "none",
        "norm": {"type": "rms_norm"},
        "head": {"tied": True},
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "atlas-170m": _atlas(768, 12, 16),
    "atlas-340m": _atlas(1024, 24, 16),
    "atlas-760m": _atlas(1536, 24, 16),
    "atlas-1.3b": _atlas(2048, 18, 8),
}

_SOURCE = "Behrouz et al. 2025, ATLAS"
_NOTE = "no exact count was published; width of the feed-forward layers and feature map are ours"

FACTS: dict[str, Facts] = {name: Facts(None, _SOURCE, note=_NOTE) for name in VARIANTS}
