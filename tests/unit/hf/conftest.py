"""Tiny random models made by transformers, and folders of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama-tied-biased": ("Llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {**SMALL, "head_dim": 20, "num_key_value_heads": 1}),
    "llama-linear": ("Llama", {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}),
    "llama-llama3": ("Llama", {**SMALL, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "llama-yarn": ("Llama", {**SMALL, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16}),
    "qwen3-tied-biased": ("Qwen3", {**SMALL, "head_dim": 24, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-yarn": (
        "Qwen3",
        {**SMALL, "head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}},
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 97,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "neox": ("GPTNeoX", {**SMALL, "num_key_value_heads": None, "rope_parameters": HALF}),
    "neox-sequential": (
        "GPTNeoX",
        {**SMALL, "num_key_value_heads": None, "rope_parameters": HALF, "use_parallel_residual": False},
    ),
}
CLASSES = {
    "Llama": "LlamaForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "GPTNeoX": "GPTNeoXForCausalLM",
}


def make(name: str, seed: int = 0) -> Any:
    """A model of transformers with random weights, biases and norms included."""
    transformers = pytest.importorskip("transformers")
    kind, values = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        **{k: v for k, v in values.items() if v is not None or k.endswith("_id")}
    )
    model = getattr(transformers, CLASSES[kind])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """(model of transformers, the folder that it was saved in)."""

    def save(name: str, **options: Any) -> tuple[Any, Path]:
        model = make(name)
        folder = tmp_path / f"hf-{name}"
        model.save_pretrained(folder, **options)
        return model, folder

    return save
