"""RetNet: retention with a gated feed-forward layer, in the shapes of torchscale and of flash-linear-attention."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.facts import Facts


def _torchscale(d_model: int, n_layers: int, n_heads: int, d_values: int) -> dict[str, Any]:
    """The feed-forward layer is as wide as all values together."""
    mixer = {
        "type": "retention",
        "n_heads": n_heads,
        "d_value": d_values // n_heads,
        "head_norm": {"type": "rms_norm", "eps": 1e-6, "affine": False},
        "xavier_init": True,
    }
    return {
        "vocab_size": 32000,
        "d_model": d_model,
        "max_seq_len": 2048,
        "layers": [
            {"pattern": [{"mixer": mixer, "channel": {"type": "swiglu", "d_hidden": d_values}}], "repeat": n_layers}
        ],
        "position": {"type": "none"},
        "norm": {"type": "rms_norm", "eps": 1e-6},
        "head": {"tied": False},
    }


_FLA_MIXER = {
    "type": "retention",
    "n_heads": 8,
    "rotation": "position",
    "head_norm": {"type": "rms_norm", "eps": 1e-6},
}
_FLA = {
    "vocab_size": 32000,
    "d_model": 2048,
    "max_seq_len": 2048,
    "layers": [{"pattern": [{"mixer": _FLA_MIXER, "channel": {"type": "swiglu", "d_hidden": 2816}}], "repeat": 24}],
    "position": {"type": "rope", "theta": 10000.0},
    "norm": {"type": "rms_norm", "eps": 1e-6},
    "head": {"tied": False},
}

_SIZES: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "retnet-base": ((512, 6, 2, 864), 19_077_632),
    "retnet-medium": ((1024, 16, 4, 1728), 203_457_536),
    "retnet-xl": ((2048, 24, 8, 3456), 1_220_642_816),
    "retnet-3b": ((2560, 32, 10, 4280), 2_523_302_400),
    "retnet-7b": ((4096, 32, 16, 6912), 6_509_826_048),
    "retnet-13b": ((5120, 40, 20, 8560), 12_616_094_720),
    "retnet-65b": ((8192, 64, 32, 13824), 52_077_535_232),
}

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: _torchscale(*shape) for name, (shape, _) in _SIZES.items()},
    "retnet-fla-1.3b": _FLA,
}


def _without_embeddings(config: Any) -> dict[str, int]:
    tables = 2 * config.required_vocab_size() * config.d_model
    return {"without embeddings": config.cost().total.params - tables}


FACTS: dict[str, Facts] = {
    **{
        name: Facts(
            None,
            "Sun et al. 2023, RetNet; shapes of torchscale",
            counts={"without embeddings": count},
            count=_without_embeddings,
            note="the vocabulary is ours",
        )
        for name, (_, count) in _SIZES.items()
    },
    "retnet-fla-1.3b": Facts(1_351_727_104, "flash-linear-attention 0.6.0, RetNetConfig()"),
}
