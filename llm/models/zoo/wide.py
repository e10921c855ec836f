"""Wide attention: shapes whose heads in all, layers times heads per layer, are the same from deep to a single layer."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.facts import Facts

SWEEPS: dict[str, tuple[int, int, int, int, int]] = {
    "aspect-6x8": (6, 8, 512, 64, 2048),
    "aspect-3x16": (3, 16, 512, 64, 2048),
    "aspect-2x24": (2, 24, 512, 64, 2048),
    "aspect-1x48": (1, 48, 512, 64, 2048),
    "aspect-4x4": (4, 4, 128, 32, 512),
    "aspect-2x8": (2, 8, 128, 32, 512),
    "aspect-1x16": (1, 16, 128, 32, 512),
}
"""Name -> layers, heads per layer, d_model, d_head, d_hidden."""


def aspect(n_layers: int, n_heads: int, d_model: int, d_head: int, d_hidden: int) -> dict[str, Any]:
    """Model section of a decoder over bytes; the attention's width n_heads * d_head has nothing to do with d_model."""
    block = {
        "mixer": {"type": "attention", "n_heads": n_heads, "d_head": d_head},
        "channel": {"type": "mlp", "activation": "gelu", "d_hidden": d_hidden},
        "residual": "pre",
    }
    return {
        "vocab_size": 257,
        "d_model": d_model,
        "max_seq_len": 1024,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "position": {"type": "learned"},
        "norm": {"type": "layer_norm", "eps": 1e-5},
    }


def count_matrices(config: Any) -> dict[str, int]:
    """Weights of attention, of feed-forward layers and of both, from the costs of the blocks' parts."""
    attention = feed_forward = 0
    for layer, block in enumerate(config.blocks()):
        dims = config.context(layer, block).dims()
        attention += block.mixer.cost(dims, 1, "train").params
        feed_forward += block.channel.cost(dims, 1, "train").params
    return {"attention": attention, "feed-forward": feed_forward, "both": attention + feed_forward}


def _facts(n_layers: int, n_heads: int, d_model: int, d_head: int, d_hidden: int) -> Facts:
    attention, feed_forward = 4 * d_model * n_heads * d_head * n_layers, 2 * d_model * d_hidden * n_layers
    counts = {"attention": attention, "feed-forward": feed_forward, "both": attention + feed_forward}
    note = "rows: 4 d H a and 2 d f per layer; as a decoder over bytes, where the paper classifies with an encoder"
    return Facts(None, "Brown et al. 2022, Wide Attention", counts=counts, count=count_matrices, note=note)


VARIANTS: dict[str, dict[str, Any]] = {name: aspect(*shape) for name, shape in SWEEPS.items()}
FACTS: dict[str, Facts] = {name: _facts(*shape) for name, shape in SWEEPS.items()}
