"""Wrapped models: GPT-2 with recurrent memory, and the looped transformers of AlgoFormer."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.dense import VARIANTS as DENSE
from llm.models.zoo.facts import Facts

_GPT2 = DENSE["gpt2-124m"]


def _algoformer(n_layers: int, wrappers: list[dict[str, Any]]) -> dict[str, Any]:
    """The shape of the synthetic experiments, with a vocabulary of bytes; 101 pairs are 202 positions."""
    block = {
        "mixer": {"type": "attention", "n_heads": 8, "bias": True},
        "channel": {"type": "mlp", "activation": "gelu_tanh", "d_hidden": 1024, "bias": True},
    }
    return {
        "vocab_size": 256,
        "d_model": 256,
        "max_seq_len": 202,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "position": {"type": "learned"},
        "norm": {"type": "layer_norm", "eps": 1e-5},
        "wrappers": wrappers,
    }


_LOOP: dict[str, Any] = {"type": "loop", "n_loop": 1, "n_loops": 20}

VARIANTS: dict[str, dict[str, Any]] = {
    "rmt-gpt2-124m": {**_GPT2, "wrappers": [{"type": "rmt", "n_memory": 16, "segment": 512}]},
    "armt-gpt2-133m": {**_GPT2, "wrappers": [{"type": "armt", "n_memory": 10, "segment": 512, "d_memory": 64}]},
    "algoformer-2.4m": _algoformer(3, [{**_LOOP, "n_pre": 1, "loss_window": 15}]),
    "looped-0.8m": _algoformer(1, [{**_LOOP, "inject": "add", "loss_window": 15, "gradient_window": 15}]),
}


def _added(config: Any) -> dict[str, int]:
    """Parameters that the memory adds to GPT-2, and of those the associative part of a layer."""
    bare = config.replace(wrappers=[])
    added = config.cost().total.params - bare.cost().total.params
    tokens = config.wrappers[0].n_memory * config.d_model
    counts = {"memory tokens": tokens}
    if config.wrappers[0].type == "armt":
        counts |= {"associative memory of a layer": (added - tokens) // config.n_layers}
        counts |= {"associative memories": added - tokens}
    return counts


def _blocks(config: Any) -> dict[str, int]:
    return {"blocks": config.cost().blocks.params}


_RMT = "Bulatov et al. 2024, arXiv:2402.10790"
_ARMT = "Rodkin et al. 2024, arXiv:2407.04841"
_ALGOFORMER = "Gao et al. 2024, arXiv:2402.13572"

FACTS: dict[str, Facts] = {
    "rmt-gpt2-124m": Facts(
        None, _RMT, counts={"memory tokens": 12_288}, count=_added, note="the paper calls GPT-2's 124M 137M"
    ),
    "armt-gpt2-133m": Facts(
        None,
        _ARMT,
        counts={
            "memory tokens": 7_680,
            "associative memory of a layer": 688_897,
            "associative memories": 8_266_764,
        },
        count=_added,
        note="counts follow from the method's shapes; the paper calls it 145M, as it calls GPT-2's 124M 137M",
    ),
    "algoformer-2.4m": Facts(
        None,
        _ALGOFORMER,
        counts={"blocks": 3 * 789_760},
        count=_blocks,
        note="counts follow from the shapes, the vocabulary is ours",
    ),
    "looped-0.8m": Facts(
        None,
        "Yang et al. 2023, arXiv:2311.12424",
        counts={"blocks": 789_760},
        count=_blocks,
        note="counts follow from the shapes, the vocabulary is ours",
    ),
}
