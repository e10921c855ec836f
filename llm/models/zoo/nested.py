"""MatFormer: the MatLM sizes of the paper with their four nested slices, and the shapes of its OLMo reproduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm.models.zoo.facts import Facts

SLICES = {"XL": 1, "L": 2, "M": 4, "S": 8}
"""Name of a slice -> what the feed-forward width is divided by."""

MATLM = {
    "matlm-78m": 256,
    "matlm-180m": 512,
    "matlm-310m": 768,
    "matlm-463m": 1024,
    "matlm-850m": 1536,
    "matlm-1.3b": 2048,
    "matlm-2.6b": 3072,
}
"""Name -> d_model."""


def _matlm(d_model: int) -> dict[str, Any]:
    block = {
        "mixer": {"type": "attention", "n_heads": 16},
        "channel": {"type": "nested_mlp", "activation": "gelu", "d_hidden": 4 * d_model},
        "residual": "pre",
    }
    return {
        "vocab_size": 256000,
        "d_model": d_model,
        "max_seq_len": 1024,
        "layers": [{"pattern": [block], "repeat": 16}],
        "head": {"tied": True},
        "wrappers": ["nested"],
    }


def _olmo(d_model: int) -> dict[str, Any]:
    block = {
        "mixer": {"type": "attention", "n_heads": 16, "n_kv_heads": 1, "bias": True},
        "channel": {"type": "nested_mlp", "activation": "gelu", "d_hidden": 8 * d_model, "bias": True},
        "residual": "pre",
    }
    return {
        "vocab_size": 50304,
        "d_model": d_model,
        "max_seq_len": 2048,
        "layers": [{"pattern": [block], "repeat": 8}],
        "position": {"type": "alibi"},
        "norm": {"type": "layer_norm", "eps": 1e-5},
        "head": {"tied": True},
        "wrappers": [{"type": "nested", "objective": "summed"}],
    }


def matlm_params(d_model: int, divisor: int, *, embedding: bool = True) -> int:
    """The paper's count of a slice: embedding, attention and feed-forward matrices, without norms and biases."""
    return (256000 * d_model if embedding else 0) + 16 * (4 * d_model**2 + 8 * d_model**2 // divisor)


def count_slices(config: Any) -> dict[str, int]:
    """The same figures of a config, from the models that the slices are."""
    from llm.models.extract import plain_config
    from llm.models.nesting import SliceOptions

    found = {}
    for name, divisor in SLICES.items():
        plain = plain_config(config, SliceOptions(slice=1 / divisor).of(config))
        norms = sum(
            block.residual.cost(
                plain.context(layer, block).dims(), mixer=block.mixer is not None, channel=block.channel is not None
            ).params
            for layer, block in enumerate(plain.blocks())
        )
        cost = plain.cost()
        total = cost.total.params - norms - (plain.final_norm or plain.norm).cost(plain.d_model).params
        found[f"{name} without norms"] = total
        found[f"{name} without norms and embedding"] = total - cost.embed.params
    return found


def _matlm_facts(d_model: int) -> Facts:
    counts = {}
    for name, divisor in SLICES.items():
        counts[f"{name} without norms"] = matlm_params(d_model, divisor)
        counts[f"{name} without norms and embedding"] = matlm_params(d_model, divisor, embedding=False)
    count: Callable[[Any], dict[str, int]] = count_slices
    note = "rows: the formula that gives every size the paper names, without norms; norm and positions are ours"
    return Facts(None, "Devvrit et al. 2023, MatFormer", counts=counts, count=count, note=note)


_OLMO_NOTE = "the repository names it after a size of the paper that it does not have; weights of none are published"

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: _matlm(d_model) for name, d_model in MATLM.items()},
    "matformer-olmo-d512": _olmo(512),
    "matformer-olmo-d1024": _olmo(1024),
    "matformer-olmo-d2048": _olmo(2048),
}
FACTS: dict[str, Facts] = {
    **{name: _matlm_facts(d_model) for name, d_model in MATLM.items()},
    **{
        f"matformer-olmo-d{d_model}": Facts(params, "MatFormer-OLMo repository", tolerance=1e-3, note=_OLMO_NOTE)
        for d_model, params in ((512, 63_800_000), (1024, 203_700_000), (2048, 711_400_000))
    },
}
