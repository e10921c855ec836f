"""Is a model of ours exactly of a Hugging Face family's shape? If so, its config.json; if not, what prevents it.

The test is a round trip: a config.json is made from the config, our config from that, and both must be equal in all
that the model computes. So a key that is added to some block later prevents an export until it has a translation.
"""

from __future__ import annotations

from typing import Any

from llm.blocks.channels.gated import SwiGLUConfig
from llm.blocks.mixers.attention import AttentionConfig
from llm.blocks.norms import RMSNormConfig
from llm.blocks.rope import RopeConfig
from llm.checkpoint.hf.families import FAMILIES, Family
from llm.checkpoint.hf.rope import rope_to_hf
from llm.config.load import validate
from llm.core.errors import UserError
from llm.models.config import ModelConfig

NOT_COMPUTED = ("variant", "init", "dropout")
"""Keys of the model section that have no part in what a trained model computes."""


def hf_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """(family, config.json without token ids and dtype) of a Llama- or Qwen3-shaped model; UserError for any other."""
    mixer, channel = _uniform(config)
    family = FAMILIES["qwen3" if mixer.qk_norm is not None else "llama"]
    assert isinstance(config.norm, RMSNormConfig) and isinstance(config.position, RopeConfig)
    heads, kv_heads, width = mixer.resolved(config.d_model)
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.required_vocab_size(),
        "hidden_size": config.d_model,
        "intermediate_size": channel.width(config.d_model),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm.eps,
        "attention_bias": mixer.biases()[0],
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.head.tied,
        "initializer_range": config.init.std if config.init.std is not None else config.d_model**-0.5,
        "use_cache": True,
        **rope_to_hf(config.position, width, config.max_seq_len),
    }
    if family.model_type == "llama":
        hf["mlp_bias"] = channel.bias
    else:
        hf |= {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * config.n_layers}
    back = canonical(validate(ModelConfig, family.to_ours(hf)))
    ours = canonical(config)
    if config.position.scaling is not None and "ntk" in config.position.scaling.type:
        ours["position"] = back["position"]
    found = _difference(ours, back, "model")
    if found is not None:
        key, given, needed = found
        raise UserError(
            f"cannot export: {key} is {given!r}, {family.architecture} has {needed!r} there and no setting for it"
        )
    return family, hf


def _uniform(config: ModelConfig) -> tuple[AttentionConfig, SwiGLUConfig]:
    """Mixer and channel of the layers, which must be of the right kinds; `hf_config` compares their values."""
    for i, block in enumerate(config.blocks()):
        if not isinstance(block.mixer, AttentionConfig) or block.mixer.type != "attention":
            raise _kind(f"model layer {i}: mixer", block.mixer, "attention")
        if not isinstance(block.channel, SwiGLUConfig) or block.channel.type != "swiglu":
            raise _kind(f"model layer {i}: channel", block.channel, "swiglu")
        if block.norm is not None and block.norm != config.norm:
            raise UserError(
                f"cannot export: model layer {i} has a norm of its own; Llama and Qwen3 have the same one in all layers"
            )
        if block.position is not None and block.position != config.position:
            raise UserError(
                f"cannot export: model layer {i} has a position of its own; "
                "Llama and Qwen3 have the same one in all layers"
            )
    if not isinstance(config.norm, RMSNormConfig):
        raise _kind("model.norm", config.norm, "rms_norm")
    if not isinstance(config.position, RopeConfig):
        raise _kind("model.position", config.position, "rope")
    first = config.blocks()[0]
    assert isinstance(first.mixer, AttentionConfig) and isinstance(first.channel, SwiGLUConfig)
    return first.mixer, first.channel


def _kind(where: str, given: Any, needed: str) -> UserError:
    name = getattr(given, "type", None)
    return UserError(f"cannot export: {where} is {name!r}, Llama- and Qwen3-shaped models have {needed!r} there")


def canonical(config: ModelConfig) -> dict[str, Any]:
    """All that a model computes, as plain data in which equal models are equal."""
    tree = {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}
    tree["embed"] = {key: value for key, value in tree["embed"].items() if key != "std"}
    tree["final_norm"] = tree["final_norm"] or tree["norm"]
    tree["linear"] = {role: linear for role, linear in tree["linear"].items() if linear.get("type") != "dense"}
    del tree["layers"]
    tree["blocks"] = [_canonical_block(config, block) for block in config.blocks()]
    return tree


def _canonical_block(config: ModelConfig, block: Any) -> dict[str, Any]:
    tree = block.to_dict()
    tree["norm"] = tree["norm"] or config.to_dict()["norm"]
    tree["position"] = tree["position"] or config.to_dict()["position"]
    if isinstance(block.mixer, AttentionConfig):
        heads, kv_heads, width = block.mixer.resolved(config.d_model)
        qkv_bias, out_bias = block.mixer.biases()
        scale = block.mixer.scale if block.mixer.scale is not None else width**-0.5
        tree["mixer"] |= {"n_heads": heads, "n_kv_heads": kv_heads, "d_head": width, "scale": scale}
        tree["mixer"] |= {"qkv_bias": qkv_bias, "out_bias": out_bias, "bias": None, "backend": "auto"}
    if isinstance(block.channel, SwiGLUConfig):
        tree["channel"]["d_hidden"] = block.channel.width(config.d_model)
    if config.position.to_dict() != tree["position"]:
        return tree
    # The model's own position is compared once, at the top.
    tree["position"] = None
    return tree


def _difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any] | None:
    """(key, value in a, value in b) of the first place where two trees differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            found = _difference(a.get(key), b.get(key), f"{path}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            found = _difference(x, y, f"{path}.{index}")
            if found is not None:
                return found
        return None
    return None if a == b else (path, a, b)
