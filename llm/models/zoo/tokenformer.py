"""TokenFormer (Wang et al. 2024): every linear layer attends over parameter tokens."""

from __future__ import annotations

import math
from typing import Any

from llm.models.zoo.facts import Facts


def _tokenformer(d_model: int, n_layers: int, n_heads: int, n_tokens: int, max_seq_len: int = 2048) -> dict[str, Any]:
    """n_tokens in each projection of attention, four times as many in the feed-forward layer."""
    value_std = round(2.0 / (n_layers * math.sqrt(d_model)), 6)
    block = {
        "mixer": {"type": "attention", "n_heads": n_heads},
        "channel": {"type": "token_ffn", "n_tokens": 4 * n_tokens, "key_std": 0.02, "value_std": value_std},
        "residual": "pre",
    }
    return {
        "vocab_size": 50304,
        "d_model": d_model,
        "max_seq_len": max_seq_len,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "linear": {"mixer.*": {"type": "pattention", "n_tokens": n_tokens, "key_std": 0.02, "value_std": value_std}},
        "position": {"type": "rope", "theta": 10000.0, "fraction": 0.25},
        "norm": {"type": "layer_norm", "eps": 1e-5, "affine": False, "bias": False},
        "final_norm": {"type": "layer_norm", "eps": 1e-5},
        "head": {"tied": True},
    }


def _counts(config: Any) -> dict[str, int]:
    total = config.cost().total.params
    table = config.vocab_size * config.d_model
    return {"without the embedding": total - table, "with an untied head": total + table}


def _without_embedding(config: Any) -> dict[str, int]:
    return {"without the embedding": _counts(config)["without the embedding"]}


VARIANTS: dict[str, dict[str, Any]] = {
    "tokenformer-150m": _tokenformer(768, 12, 12, 768),
    "tokenformer-450m": _tokenformer(1024, 24, 16, 1024),
    "tokenformer-900m": _tokenformer(1280, 32, 16, 1280),
    "tokenformer-1.5b": _tokenformer(1536, 40, 16, 1536),
    "tokenformer-owt-354m": _tokenformer(1024, 24, 16, 768, max_seq_len=1024),
    "tokenformer-owt-757m": _tokenformer(1024, 24, 16, 1792, max_seq_len=1024),
    "tokenformer-growth-124m": _tokenformer(768, 12, 12, 576, max_seq_len=1024),
    "tokenformer-growth-354m": _tokenformer(768, 12, 12, 2140, max_seq_len=1024),
}

_PAPER = "Wang et al. 2024, TokenFormer"
_HUB = "Haiyang-W/TokenFormer-"

FACTS: dict[str, Facts] = {
    "tokenformer-150m": Facts(
        151_881_216, _PAPER, f"{_HUB}150M",
        counts={"without the embedding": 113_247_744, "with an untied head": 190_514_688}, count=_counts,
    ),
    "tokenformer-450m": Facts(
        454_166_528, _PAPER, f"{_HUB}450M", counts={"without the embedding": 402_655_232}, count=_without_embedding
    ),
    "tokenformer-900m": Facts(
        903_252_480, _PAPER, f"{_HUB}900M", counts={"without the embedding": 838_863_360}, count=_without_embedding
    ),
    "tokenformer-1.5b": Facts(
        1_587_219_456, _PAPER, counts={"without the embedding": 1_509_952_512}, count=_without_embedding
    ),
    "tokenformer-owt-354m": Facts(353_503_232, _PAPER, note="of OpenWebText2"),
    "tokenformer-owt-757m": Facts(756_156_416, _PAPER, note="grown from owt-354m by parameter tokens alone"),
    "tokenformer-growth-124m": Facts(123_569_664, _PAPER, note="where the paper's scaling run begins"),
    "tokenformer-growth-354m": Facts(354_190_848, _PAPER, note="its next size, of the same width"),
}  # fmt: skip
