"""Dense transformers: GPT-2, Llama 3, Qwen3, Pythia, and small shapes to measure with."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.facts import Facts


def _gpt2(d_model: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    block = {
        "mixer": {"type": "attention", "n_heads": n_heads, "bias": True},
        "channel": {"type": "mlp", "activation": "gelu_tanh", "d_hidden": 4 * d_model, "bias": True},
        "residual": "pre",
    }
    return {
        "vocab_size": 50257,
        "d_model": d_model,
        "max_seq_len": 1024,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "position": {"type": "learned"},
        "norm": {"type": "layer_norm", "eps": 1e-5},
        "head": {"tied": True},
    }


def _llama(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    d_hidden: int,
    *,
    tied: bool,
    vocab_size: int = 128256,
    max_seq_len: int = 131072,
    position: dict[str, Any],
    eps: float = 1e-5,
    d_head: int | None = None,
    qk_norm: bool = False,
) -> dict[str, Any]:
    norm = {"type": "rms_norm", "eps": eps}
    mixer: dict[str, Any] = {
        "type": "attention",
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head or d_model // n_heads,
    }
    if qk_norm:
        mixer["qk_norm"] = norm
    block = {"mixer": mixer, "channel": {"type": "swiglu", "d_hidden": d_hidden}, "residual": "pre"}
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "max_seq_len": max_seq_len,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "position": position,
        "norm": norm,
        "head": {"tied": tied},
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "type": "rope",
        "theta": 500000.0,
        "scaling": {
            "type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_seq_len": 8192,
        },
    }


def _pythia(d_model: int, n_layers: int, n_heads: int) -> dict[str, Any]:
    block = {
        "mixer": {"type": "attention", "n_heads": n_heads, "bias": True},
        "channel": {"type": "mlp", "activation": "gelu", "d_hidden": 4 * d_model, "bias": True},
        "residual": "parallel",
    }
    return {
        "vocab_size": 50304,
        "d_model": d_model,
        "max_seq_len": 2048,
        "layers": [{"pattern": [block], "repeat": n_layers}],
        "position": {"type": "rope", "theta": 10000.0, "fraction": 0.25},
        "norm": {"type": "layer_norm", "eps": 1e-5},
        "head": {"tied": False},
    }


def _bench(d_model: int, n_layers: int, n_heads: int, d_hidden: int) -> dict[str, Any]:
    position = {"type": "rope", "theta": 10000.0}
    return _llama(
        d_model, n_layers, n_heads, n_heads, d_hidden, tied=True, vocab_size=50304, max_seq_len=4096, position=position
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2-124m": _gpt2(768, 12, 12),
    "gpt2-355m": _gpt2(1024, 24, 16),
    "gpt2-774m": _gpt2(1280, 36, 20),
    "gpt2-1.5b": _gpt2(1600, 48, 25),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, tied=True, position=_llama3_rope(32.0)),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, tied=False, position=_llama3_rope(8.0)),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28672, tied=False, position=_llama3_rope(8.0)),
    "qwen3-0.6b": _llama(
        1024, 28, 16, 8, 3072,
        tied=True, vocab_size=151936, max_seq_len=40960, position={"type": "rope", "theta": 1000000.0},
        eps=1e-6, d_head=128, qk_norm=True,
    ),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "bench-llama-124m": _bench(768, 12, 12, 2048),
    "bench-llama-360m": _bench(1024, 24, 16, 2816),
    "bench-llama-1.3b": _bench(2048, 24, 16, 5504),
}  # fmt: skip

_GPT2 = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners"
_LLAMA3 = "Grattafiori et al. 2024, The Llama 3 Herd of Models"
_PYTHIA = "Biderman et al. 2023, Pythia"
_OWN = "shape for measurements, no published weights"

FACTS: dict[str, Facts] = {
    "gpt2-124m": Facts(124_439_808, _GPT2, "openai-community/gpt2"),
    "gpt2-355m": Facts(354_823_168, _GPT2, "openai-community/gpt2-medium"),
    "gpt2-774m": Facts(774_030_080, _GPT2, "openai-community/gpt2-large"),
    "gpt2-1.5b": Facts(1_557_611_200, _GPT2, "openai-community/gpt2-xl"),
    "llama-3.2-1b": Facts(1_235_814_400, "Meta 2024, Llama 3.2 model card", "meta-llama/Llama-3.2-1B"),
    "llama-3.1-8b": Facts(8_030_261_248, _LLAMA3, "meta-llama/Llama-3.1-8B"),
    "llama-3.1-70b": Facts(70_553_706_496, _LLAMA3, "meta-llama/Llama-3.1-70B"),
    "qwen3-0.6b": Facts(596_049_920, "Yang et al. 2025, Qwen3 Technical Report", "Qwen/Qwen3-0.6B"),
    "pythia-160m": Facts(162_322_944, _PYTHIA, "EleutherAI/pythia-160m"),
    "pythia-410m": Facts(405_334_016, _PYTHIA, "EleutherAI/pythia-410m"),
    "bench-llama-124m": Facts(None, _OWN),
    "bench-llama-360m": Facts(None, _OWN),
    "bench-llama-1.3b": Facts(None, _OWN),
}
