"""SLAB's language model: Llama of 350M parameters with RMSNorm, and with the progressive batch norm."""

from __future__ import annotations

from typing import Any

from llm.models.config import ModelConfig
from llm.models.merge_norms import merge_norms
from llm.models.zoo.facts import Facts


def _llama_350m(norm: dict[str, Any]) -> dict[str, Any]:
    block = {
        "mixer": {"type": "attention", "n_heads": 8},
        "channel": {"type": "swiglu", "d_hidden": 4096},
        "residual": "pre",
    }
    return {
        "vocab_size": 32000,
        "d_model": 1024,
        "max_seq_len": 2048,
        "layers": [{"pattern": [block], "repeat": 18}],
        "position": {"type": "rope", "theta": 10000.0},
        "norm": norm,
        "head": {"tied": False},
    }


def _merged(config: ModelConfig) -> dict[str, int]:
    """Parameters after every norm has gone into the linear layers behind it."""
    model = config.build("meta").eval()
    merge_norms(model)
    return {"norms merged": sum(p.numel() for p in model.parameters())}


RMS_NORM = {"type": "rms_norm", "eps": 1e-6}

VARIANTS: dict[str, dict[str, Any]] = {
    "slab-llama-350m-rms": _llama_350m(RMS_NORM),
    "slab-llama-350m": _llama_350m(
        {"type": "prep_bn", "inner": RMS_NORM, "eps": 1e-6, "warm_steps": 10_000, "decay_steps": 18_000}
    ),
}

_SOURCE = "Guo et al. 2024, SLAB; counted from the official constructors"

FACTS: dict[str, Facts] = {
    "slab-llama-350m-rms": Facts(367_563_776, _SOURCE),
    "slab-llama-350m": Facts(
        367_639_589, _SOURCE, counts={"norms merged": 367_760_640}, count=_merged, note="training form"
    ),
}
