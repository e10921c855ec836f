"""Rotary settings between our RopeConfig and Hugging Face's config.json, in its old and its new spelling."""

from __future__ import annotations

import math
from typing import Any

from llm.blocks.rope import RopeConfig
from llm.core.errors import UserError

KNOWN = ("default", "linear", "yarn", "llama3")


def rope_from_hf(hf: dict[str, Any], default_theta: float = 10000.0, default_fraction: float = 1.0) -> dict[str, Any]:
    """Our position section from config.json's rope_parameters (transformers 5) or rope_theta and rope_scaling (4)."""
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise UserError("config.json: rope parameters that differ between layers cannot be read")
    theta = float(given.pop("rope_theta", None) or hf.get("rope_theta") or hf.get("rotary_emb_base") or default_theta)
    fraction = given.pop("partial_rotary_factor", None)
    if fraction is None:
        fraction = hf.get("partial_rotary_factor", hf.get("rotary_pct", default_fraction))
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    position: dict[str, Any] = {"type": "rope", "theta": theta, "fraction": float(fraction)}
    if kind == "default":
        return position
    if kind not in KNOWN:
        raise UserError(f"config.json: rope type {kind!r} cannot be read (allowed: {', '.join(KNOWN)})")
    return position | {"scaling": _scaling(kind, given, hf)}


def _scaling(kind: str, given: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any]:
    longest = hf.get("max_position_embeddings", 2048)
    original = given.pop("original_max_position_embeddings", None) or longest
    factor = given.pop("factor", None)
    if factor is None:
        if kind != "yarn":
            raise UserError(f"config.json: rope type {kind!r} needs a factor")
        factor = longest / original
    scaling: dict[str, Any] = {"type": kind, "factor": float(factor)}
    if kind == "yarn":
        scaling["original_max_seq_len"] = original
        scaling |= {name: given.pop(name) for name in ("beta_fast", "beta_slow") if given.get(name)}
        scaling["truncate"] = given.pop("truncate", True)
        scaling["attention_factor"] = _attention_factor(given, float(factor))
    elif kind == "llama3":
        scaling["original_max_seq_len"] = original
        scaling |= {name: given.pop(name) for name in ("low_freq_factor", "high_freq_factor")}
    left = sorted(name for name, value in given.items() if value is not None and name not in ("beta_fast", "beta_slow"))
    if left:
        raise UserError(f"config.json: rope type {kind!r} has a key {left[0]!r} that cannot be read")
    return scaling


def _attention_factor(given: dict[str, Any], factor: float) -> float | None:
    fixed, mscale, mscale_all = (given.pop(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if fixed is not None:
        return float(fixed)
    if mscale and mscale_all and factor > 1:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return None


def rope_to_hf(rope: RopeConfig, d_head: int, max_seq_len: int) -> dict[str, Any]:
    """config.json's keys for a position section, in both spellings. NTK scaling becomes the base that it stands for."""
    theta = rope.theta
    scaling = rope.scaling
    named: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and scaling.type in ("ntk", "dynamic_ntk"):
        growth = scaling.factor
        if scaling.original_max_seq_len is not None:
            growth = scaling.factor * max(1.0, max_seq_len / scaling.original_max_seq_len) - (scaling.factor - 1)
        theta = theta * growth ** (d_head / (d_head - 2))
    elif scaling is not None:
        named = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type in ("yarn", "llama3"):
            named["original_max_position_embeddings"] = scaling.original_max_seq_len
        if scaling.type == "yarn":
            named |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            if scaling.attention_factor is not None:
                named["attention_factor"] = scaling.attention_factor
        if scaling.type == "llama3":
            named |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    old = None if named["rope_type"] == "default" else dict(named)
    return {"rope_theta": theta, "rope_scaling": old, "rope_parameters": {**named, "rope_theta": theta}}
