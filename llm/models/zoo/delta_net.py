"""DeltaNet and Gated DeltaNet in the default shapes of flash-linear-attention."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.facts import Facts


def _fla(mixer: dict[str, Any], n_layers: int) -> dict[str, Any]:
    block = {"mixer": {**mixer, "head_norm": {"type": "rms_norm", "eps": 1e-6}},
             "channel": {"type": "swiglu", "d_hidden": 5632}}  # fmt: skip
    return {
        "vocab_size": 32000,
        "d_model": 2048,
        "max_seq_len": 2048,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "position": {"type": "none"},
        "norm": {"type": "rms_norm", "eps": 1e-6},
        "head": {"tied": False},
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "delta-net-1.3b": _fla({"type": "delta_net", "n_heads": 16}, 24),
    "gated-delta-net-1.3b": _fla({"type": "gated_delta_net", "n_heads": 6, "d_key": 256}, 21),
}

FACTS: dict[str, Facts] = {
    "delta-net-1.3b": Facts(1_365_677_056, "flash-linear-attention 0.6.0, DeltaNetConfig()"),
    "gated-delta-net-1.3b": Facts(1_387_348_732, "flash-linear-attention 0.6.0, GatedDeltaNetConfig()"),
}
