"""Mamba-2: layers of one mixer each, without feed-forward parts."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.facts import Facts


def _mamba2(d_model: int, n_layers: int, *, vocab_size: int = 50288, tied: bool = True) -> dict[str, Any]:
    """50,277 tokens, rounded up to a multiple of 16."""
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "max_seq_len": 2048,
        "layers": [{"pattern": [{"mixer": {"type": "mamba2"}}], "repeat": n_layers}],
        "position": {"type": "none"},
        "norm": {"type": "rms_norm", "eps": 1e-5},
        "head": {"tied": tied},
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "mamba2-130m": _mamba2(768, 24),
    "mamba2-370m": _mamba2(1024, 48),
    "mamba2-780m": _mamba2(1536, 48),
    "mamba2-1.3b": _mamba2(2048, 48),
    "mamba2-2.7b": _mamba2(2560, 64),
    "mamba2-fla-1.3b": _mamba2(2048, 48, vocab_size=32000, tied=False),
}

_PAPER = "Dao and Gu 2024, Mamba-2; counted by transformers 5.23"

FACTS: dict[str, Facts] = {
    "mamba2-130m": Facts(128_989_632, _PAPER, "state-spaces/mamba2-130m"),
    "mamba2-370m": Facts(368_346_624, _PAPER, "state-spaces/mamba2-370m"),
    "mamba2-780m": Facts(780_161_280, _PAPER, "state-spaces/mamba2-780m"),
    "mamba2-1.3b": Facts(1_343_757_312, _PAPER, "state-spaces/mamba2-1.3b"),
    "mamba2-2.7b": Facts(2_702_599_680, _PAPER, "state-spaces/mamba2-2.7b"),
    "mamba2-fla-1.3b": Facts(1_371_839_488, "flash-linear-attention 0.6.0, Mamba2Config()"),
}
