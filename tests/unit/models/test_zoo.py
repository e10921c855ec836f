"""Named variants: their published parameter counts, from the config, from the built modules and from transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config.load import read_tree
from llm.core.errors import UserError
from llm.models.config import ModelConfig
from llm.models.zoo import FACTS, OTHERS, VARIANTS, variant
from llm.models.zoo.__main__ import counts, table, wrong

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}


def llama(
    hidden: int, layers: int, heads: int, inner: int, *, tied: bool, factor: float, **more: Any
) -> tuple[str, dict[str, Any]]:
    return "LlamaConfig", {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "llama3", "factor": factor, **LLAMA3},
    }


def gpt2(n_embd: int, n_layer: int, n_head: int) -> tuple[str, dict[str, Any]]:
    return "GPT2Config", {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}


def pythia(hidden: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "GPTNeoXConfig", {
        "vocab_size": 50304,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }


QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-124m": gpt2(768, 12, 12),
    "gpt2-355m": gpt2(1024, 24, 16),
    "gpt2-774m": gpt2(1280, 36, 20),
    "gpt2-1.5b": gpt2(1600, 48, 25),
    "llama-3.2-1b": llama(2048, 16, 32, 8192, tied=True, factor=32.0),
    "llama-3.1-8b": llama(4096, 32, 32, 14336, tied=False, factor=8.0),
    "llama-3.1-70b": llama(8192, 80, 64, 28672, tied=False, factor=8.0),
    "qwen3-0.6b": ("Qwen3Config", QWEN3),
    "pythia-160m": pythia(768, 12, 12),
    "pythia-410m": pythia(1024, 24, 16),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_parameter_count(name: str) -> None:
    config = ModelConfig.model_validate({"variant": name})
    built = sum(p.numel() for p in config.build("meta").parameters())
    assert config.cost().total.params == built
    rows = counts(name, FACTS[name])
    assert not wrong(FACTS[name], rows), rows


@pytest.mark.parametrize("name", list(THEIRS))
def test_same_shape_as_in_transformers(name: str) -> None:
    """The model that transformers builds from the published config has as many parameters, and we read its config.json
    as just this variant."""
    transformers = pytest.importorskip("transformers")
    from llm.checkpoint.hf.families import family_of
    from llm.checkpoint.hf.shape import canonical

    kind, values = THEIRS[name]
    theirs = getattr(transformers, kind)(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    assert sum(p.numel() for p in model.parameters()) == FACTS[name].params
    hf = theirs.to_dict()
    read = ModelConfig.model_validate(family_of(hf).to_ours(hf))
    assert canonical(read) == canonical(ModelConfig.model_validate({"variant": name}))


def test_keys_are_laid_over_a_variant() -> None:
    config = ModelConfig.model_validate({"variant": "llama-3.2-1b", "max_seq_len": 4096})
    assert config.max_seq_len == 4096
    assert config.d_model == 2048
    assert ModelConfig.model_validate(config.to_dict()) == config


def test_an_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model variant 'llama-3\.2-1B'; did you mean 'llama-3\.2-1b'\?"):
        variant("llama-3.2-1B")


def test_a_variant_is_the_callers_own_copy() -> None:
    variant("gpt2-124m")["layers"][0]["repeat"] = 1
    assert variant("gpt2-124m")["layers"][0]["repeat"] == 12


def test_every_variant_has_facts_and_the_page_is_current(repo_root: Path) -> None:
    assert set(FACTS) == set(VARIANTS)
    assert (repo_root / "docs" / "zoo.md").read_text() == table()[0], "run: python -m llm.models.zoo > docs/zoo.md"


def test_models_that_are_no_decoders_have_names_of_their_own() -> None:
    assert OTHERS and not set(OTHERS) & set(VARIANTS)
    page, good = table()
    assert good and all(f"| `{name}` | {other.facts.params:,} |" in page for name, other in OTHERS.items())


MODEL_FILES = sorted((Path(__file__).resolve().parents[3] / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_a_config_file_takes_the_variant_of_its_name(path: Path) -> None:
    name = path.stem
    tree = read_tree(path, "RunConfig")
    assert list(tree) == ["model"]
    config = ModelConfig.model_validate(tree["model"])
    assert config.cost().total.params == ModelConfig.model_validate({"variant": name}).cost().total.params
