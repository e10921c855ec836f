"""MemoryFormer (Ding et al. 2024): Pythia-like models whose projections are look-up tables."""

from __future__ import annotations

import math
from typing import Any

from llm.models.zoo.facts import Facts


def _memoryformer(d_model: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    """The released settings: 8 bits, 10 in the second layer of the feed-forward part, no output projection."""
    return {
        "vocab_size": 50304,
        "d_model": d_model,
        "max_seq_len": 2048,
        "layers": [
            {
                "pattern": [
                    {
                        "mixer": {"type": "attention", "n_heads": n_heads, "qkv_bias": True, "out_proj": False},
                        "channel": {"type": "memory_ffn", "n_bits": 8, "extra_bits": 2, "table_std": 0.02},
                        "residual": "pre",
                    }
                ],
                "repeat": n_layers,
            }
        ],
        "linear": {
            "mixer.[qkv]": {"type": "memory_layer", "n_bits": 8, "table_std": round(math.sqrt(0.4 / d_model), 6)}
        },
        "position": {"type": "rope", "theta": 10000.0, "fraction": 0.25},
        "norm": {"type": "rms_norm"},
        "head": {"tied": False},
    }


def _per_block(config: Any) -> dict[str, int]:
    return {"per block": config.cost().blocks.params // config.n_layers}


VARIANTS: dict[str, dict[str, Any]] = {
    "memoryformer-tiny": _memoryformer(512, 6, 8),
    "memoryformer-small-6l": _memoryformer(768, 6, 8),
    "memoryformer-small-12l": _memoryformer(768, 12, 12),
    "memoryformer-base": _memoryformer(1024, 24, 16),
}

_PAPER = "Ding et al. 2024, MemoryFormer"

FACTS: dict[str, Facts] = {
    "memoryformer-tiny": Facts(
        466_777_856, _PAPER, counts={"per block": 69_211_008}, count=_per_block, note="released config"
    ),
    "memoryformer-small-6l": Facts(
        1_011_593_856, _PAPER, counts={"per block": 155_721_024}, count=_per_block,
        note="released config of `small`, of 6 layers and 8 heads",
    ),
    "memoryformer-small-12l": Facts(
        1_945_920_000, _PAPER, counts={"per block": 155_721_024}, count=_per_block, note="of the shape of Pythia-160M"
    ),
    "memoryformer-base": Facts(
        6_747_040_768, _PAPER, counts={"per block": 276_834_048}, count=_per_block, note="of the shape of Pythia-410M"
    ),
}  # fmt: skip
