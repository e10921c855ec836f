"""Model families of Hugging Face transformers: config.json <-> ModelConfig, and where each of our tensors lies.

Legend: d = d_model, H heads, K key-value heads, Dh head width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm.checkpoint.hf.rope import rope_from_hf
from llm.core.errors import UserError
from llm.models.config import ModelConfig

Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors lies: a tensor of theirs, of this shape, and how ours is cut out of it (None: all)."""

    name: str
    shape: tuple[int, ...]
    take: Take | None = None


@dataclass(frozen=True)
class Family:
    """model_type, architecture: as in config.json. to_ours: config.json -> our model section. sources: our tensor ->
    theirs. ignored: their names (suffixes) that hold no weights. exported: whether our models can be written as it."""

    model_type: str
    architecture: str
    to_ours: Callable[[dict[str, Any]], dict[str, Any]]
    sources: Callable[[dict[str, Any], ModelConfig], dict[str, Source]]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    exported: bool = False


def _need(hf: dict[str, Any], *names: str) -> list[int]:
    for name in names:
        value = hf.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.json: {name} is {value!r}; a whole number of at least 1 is expected")
    return [hf[name] for name in names]


def _only(hf: dict[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    """UserError when a key has a value that would change the computation and that we cannot do."""
    if name in hf and hf[name] not in allowed:
        shown = ", ".join(repr(value) for value in allowed)
        raise UserError(f"config.json: {name} is {hf[name]!r}; only {shown} can be imported")


def _llama_like(hf: dict[str, Any], *, qk_norm: bool, default_theta: float = 10000.0) -> dict[str, Any]:
    vocab, d, hidden, layers, heads = _need(
        hf, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    _only(hf, "hidden_act", ("silu", "swish"))
    _only(hf, "use_sliding_window", (False, None))
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise UserError("config.json: layer_types has other layers than full_attention, which cannot be imported")
    bias = bool(hf.get("attention_bias", False))
    norm = {"type": "rms_norm", "eps": float(hf.get("rms_norm_eps", 1e-6))}
    mixer: dict[str, Any] = {
        "type": "attention",
        "n_heads": heads,
        "n_kv_heads": hf.get("num_key_value_heads") or heads,
        "d_head": hf.get("head_dim") or (128 if qk_norm else d // heads),
        "qkv_bias": bias,
        "out_bias": bias,
    }
    if qk_norm:
        mixer["qk_norm"] = norm
    channel = {"type": "swiglu", "d_hidden": hidden, "bias": bool(hf.get("mlp_bias", False))}
    return {
        "vocab_size": vocab,
        "d_model": d,
        "max_seq_len": hf.get("max_position_embeddings", 2048),
        "layers": [{"pattern": [{"mixer": mixer, "channel": channel, "residual": "pre"}], "repeat": layers}],
        "position": rope_from_hf(hf, default_theta),
        "norm": norm,
        "head": {"tied": bool(hf.get("tie_word_embeddings", False))},
    }


def _llama_sources(hf: dict[str, Any], config: ModelConfig) -> dict[str, Source]:
    d, vocab = config.d_model, config.required_vocab_size()
    found = {
        "embed.weight": Source("model.embed_tokens.weight", (vocab, d)),
        "final_norm.weight": Source("model.norm.weight", (d,)),
    }
    if not config.head.tied:
        found["unembed.weight"] = Source("lm_head.weight", (vocab, d))
    for i, block in enumerate(config.blocks()):
        mixer, channel = block.mixer, block.channel
        heads, kv_heads, width = mixer.resolved(d)  # type: ignore[union-attr]
        qkv_bias, out_bias = mixer.biases()  # type: ignore[union-attr]
        hidden = channel.width(d)  # type: ignore[union-attr]
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        linears = {
            "mixer.q": ("self_attn.q_proj", heads * width, d, qkv_bias),
            "mixer.k": ("self_attn.k_proj", kv_heads * width, d, qkv_bias),
            "mixer.v": ("self_attn.v_proj", kv_heads * width, d, qkv_bias),
            "mixer.out": ("self_attn.o_proj", d, heads * width, out_bias),
            "channel.gate": ("mlp.gate_proj", hidden, d, channel.bias),  # type: ignore[union-attr]
            "channel.up": ("mlp.up_proj", hidden, d, channel.bias),  # type: ignore[union-attr]
            "channel.down": ("mlp.down_proj", d, hidden, channel.bias),  # type: ignore[union-attr]
        }
        for own, (name, n_out, n_in, bias) in linears.items():
            found[f"{ours}.{own}.weight"] = Source(f"{theirs}.{name}.weight", (n_out, n_in))
            if bias:
                found[f"{ours}.{own}.bias"] = Source(f"{theirs}.{name}.bias", (n_out,))
        if mixer.qk_norm is not None:  # type: ignore[union-attr]
            found[f"{ours}.mixer.q_norm.weight"] = Source(f"{theirs}.self_attn.q_norm.weight", (width,))
            found[f"{ours}.mixer.k_norm.weight"] = Source(f"{theirs}.self_attn.k_norm.weight", (width,))
        found[f"{ours}.residual.mixer_norm.weight"] = Source(f"{theirs}.input_layernorm.weight", (d,))
        found[f"{ours}.residual.channel_norm.weight"] = Source(f"{theirs}.post_attention_layernorm.weight", (d,))
    return found


def _affine(ours: str, theirs: str, n: int) -> dict[str, Source]:
    return {f"{ours}.{part}": Source(f"{theirs}.{part}", (n,)) for part in ("weight", "bias")}


def _gpt2(hf: dict[str, Any]) -> dict[str, Any]:
    vocab, d, layers, heads = _need(hf, "vocab_size", "n_embd", "n_layer", "n_head")
    _only(hf, "activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    _only(hf, "scale_attn_weights", (True,))
    _only(hf, "scale_attn_by_inverse_layer_idx", (False,))
    _only(hf, "add_cross_attention", (False,))
    norm = {"type": "layer_norm", "eps": float(hf.get("layer_norm_epsilon", 1e-5))}
    mixer = {"type": "attention", "n_heads": heads, "qkv_bias": True, "out_bias": True}
    channel = {"type": "mlp", "activation": "gelu_tanh", "d_hidden": hf.get("n_inner") or 4 * d, "bias": True}
    return {
        "vocab_size": vocab,
        "d_model": d,
        "max_seq_len": hf.get("n_positions") or hf.get("n_ctx") or 1024,
        "layers": [{"pattern": [{"mixer": mixer, "channel": channel, "residual": "pre"}], "repeat": layers}],
        "position": {"type": "learned"},
        "norm": norm,
        "head": {"tied": bool(hf.get("tie_word_embeddings", True))},
    }


def _gpt2_sources(hf: dict[str, Any], config: ModelConfig) -> dict[str, Source]:
    d, vocab = config.d_model, config.required_vocab_size()
    found = {
        "embed.weight": Source("wte.weight", (vocab, d)),
        "position.weight": Source("wpe.weight", (config.max_seq_len, d)),
        **_affine("final_norm", "ln_f", d),
    }
    if not config.head.tied:
        found["unembed.weight"] = Source("lm_head.weight", (vocab, d))
    for i, block in enumerate(config.blocks()):
        hidden = block.channel.width(d)  # type: ignore[union-attr]
        ours, theirs = f"layers.{i}", f"h.{i}"
        found |= _affine(f"{ours}.residual.mixer_norm", f"{theirs}.ln_1", d)
        found |= _affine(f"{ours}.residual.channel_norm", f"{theirs}.ln_2", d)
        for part, name in enumerate(("q", "k", "v")):
            cut = slice(part * d, (part + 1) * d)
            found[f"{ours}.mixer.{name}.weight"] = Source(
                f"{theirs}.attn.c_attn.weight",
                (d, 3 * d),
                lambda w, cut=cut: w[:, cut].T,  # type: ignore[misc]
            )
            found[f"{ours}.mixer.{name}.bias"] = Source(
                f"{theirs}.attn.c_attn.bias",
                (3 * d,),
                lambda b, cut=cut: b[cut],  # type: ignore[misc]
            )
        for own, name, n_in, n_out in (
            ("mixer.out", "attn.c_proj", d, d),
            ("channel.up", "mlp.c_fc", d, hidden),
            ("channel.down", "mlp.c_proj", hidden, d),
        ):
            found[f"{ours}.{own}.weight"] = Source(f"{theirs}.{name}.weight", (n_in, n_out), lambda w: w.T)
            found[f"{ours}.{own}.bias"] = Source(f"{theirs}.{name}.bias", (n_out,))
    return found


def _neox(hf: dict[str, Any]) -> dict[str, Any]:
    vocab, d, hidden, layers, heads = _need(
        hf, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    )
    _only(hf, "hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh"))
    bias = bool(hf.get("attention_bias", True))
    mixer = {"type": "attention", "n_heads": heads, "qkv_bias": bias, "out_bias": bias}
    activation = "gelu" if hf.get("hidden_act", "gelu") == "gelu" else "gelu_tanh"
    channel = {"type": "mlp", "activation": activation, "d_hidden": hidden, "bias": True}
    residual = "parallel" if hf.get("use_parallel_residual", True) else "pre"
    return {
        "vocab_size": vocab,
        "d_model": d,
        "max_seq_len": hf.get("max_position_embeddings", 2048),
        "layers": [{"pattern": [{"mixer": mixer, "channel": channel, "residual": residual}], "repeat": layers}],
        "position": rope_from_hf(hf, default_fraction=0.25),
        "norm": {"type": "layer_norm", "eps": float(hf.get("layer_norm_eps", 1e-5))},
        "head": {"tied": bool(hf.get("tie_word_embeddings", False))},
    }


def _neox_sources(hf: dict[str, Any], config: ModelConfig) -> dict[str, Source]:
    d, vocab = config.d_model, config.required_vocab_size()
    found = {
        "embed.weight": Source("gpt_neox.embed_in.weight", (vocab, d)),
        **_affine("final_norm", "gpt_neox.final_layer_norm", d),
    }
    if not config.head.tied:
        found["unembed.weight"] = Source("embed_out.weight", (vocab, d))
    for i, block in enumerate(config.blocks()):
        heads, _, width = block.mixer.resolved(d)  # type: ignore[union-attr]
        qkv_bias, out_bias = block.mixer.biases()  # type: ignore[union-attr]
        hidden = block.channel.width(d)  # type: ignore[union-attr]
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        found |= _affine(f"{ours}.residual.mixer_norm", f"{theirs}.input_layernorm", d)
        found |= _affine(f"{ours}.residual.channel_norm", f"{theirs}.post_attention_layernorm", d)
        for part, name in enumerate(("q", "k", "v")):
            # The fused rows are ordered (head, q | k | v, channel).
            def rows(t: Tensor, part: int = part, heads: int = heads, width: int = width) -> Tensor:
                return t.view(heads, 3, width, *t.shape[1:])[:, part].flatten(0, 1)

            fused = f"{theirs}.attention.query_key_value"
            found[f"{ours}.mixer.{name}.weight"] = Source(f"{fused}.weight", (3 * d, d), rows)
            if qkv_bias:
                found[f"{ours}.mixer.{name}.bias"] = Source(f"{fused}.bias", (3 * d,), rows)
        found[f"{ours}.mixer.out.weight"] = Source(f"{theirs}.attention.dense.weight", (d, d))
        if out_bias:
            found[f"{ours}.mixer.out.bias"] = Source(f"{theirs}.attention.dense.bias", (d,))
        for own, name, n_in, n_out in (("up", "dense_h_to_4h", d, hidden), ("down", "dense_4h_to_h", hidden, d)):
            found[f"{ours}.channel.{own}.weight"] = Source(f"{theirs}.mlp.{name}.weight", (n_out, n_in))
            found[f"{ours}.channel.{own}.bias"] = Source(f"{theirs}.mlp.{name}.bias", (n_out,))
    return found


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            lambda hf: _llama_like(hf, qk_norm=False),
            _llama_sources,
            ignored=("rotary_emb.inv_freq",),
            exported=True,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            lambda hf: _llama_like(hf, qk_norm=True),
            _llama_sources,
            exported=True,
        ),
        Family("gpt2", "GPT2LMHeadModel", _gpt2, _gpt2_sources, (".attn.bias", ".attn.masked_bias"), "transformer."),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            _neox,
            _neox_sources,
            (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
        ),
    )
}


def family_of(hf: dict[str, Any]) -> Family:
    """The family of a config.json; UserError for one that cannot be imported."""
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"config.json: model_type {name!r} cannot be imported (allowed: {', '.join(FAMILIES)})")
    if hf.get("quantization_config"):
        raise UserError("config.json: quantised weights cannot be imported; give the full-precision checkpoint")
    return FAMILIES[name]
