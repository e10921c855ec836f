"""Growth: a model with more parameter tokens (Pattention) than a trained one, which computes the same at first.

New keys of zero have scores of zero: GELU(0) = 0, and the norm of the scores stays. So while the stored scale tau^2
keeps its value, no output changes, whatever the new values are. These must not be zero: the gradient of the new keys
passes through them, and that of the values through the scores. Old tokens are trained on, as in the paper.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from llm.blocks.channels.token_ffn import TokenFFNConfig
from llm.blocks.linears.pattention import Pattention, PattentionConfig
from llm.core.errors import UserError
from llm.core.init import clean_name, init_specs, name_seed
from llm.models.config import LayerGroup, ModelConfig

Scale = Literal["keep", "sqrt_n"]
NewKeys = Literal["zero", "random"]


def grown_config(model: ModelConfig, n_tokens: int | None = None, ffn_tokens: int | None = None) -> ModelConfig:
    """The model with `n_tokens` parameter tokens in each pattention linear and `ffn_tokens` in each token_ffn channel.

    None: linears stay as they are, and channels grow in the ratio of the linears.
    """
    linears = [config for config in model.linear.values() if isinstance(config, PattentionConfig)]
    channels = [block.channel for block in model.blocks() if isinstance(block.channel, TokenFFNConfig)]
    if n_tokens is None and ffn_tokens is None:
        raise UserError("growth: give n_tokens (of pattention linears), ffn_tokens (of token_ffn channels) or both")
    if n_tokens is not None and not linears:
        raise UserError("growth: n_tokens is given, but no entry of model.linear is a pattention")
    if ffn_tokens is not None and not channels:
        raise UserError("growth: ffn_tokens is given, but the model has no token_ffn channel")

    def linear(config: Any) -> Any:
        return config.replace(n_tokens=n_tokens) if n_tokens and isinstance(config, PattentionConfig) else config

    def channel(config: Any) -> Any:
        if not isinstance(config, TokenFFNConfig):
            return config
        return config.replace(n_tokens=ffn_tokens or _in_ratio(config, linears, n_tokens, model.d_model))

    groups = [
        LayerGroup(pattern=[b.replace(channel=channel(b.channel)) for b in group.pattern], repeat=group.repeat)
        for group in model.layers
    ]
    named = {role: linear(config) for role, config in model.linear.items()}
    return model.replace(variant=None, layers=groups, linear=named)


def _in_ratio(channel: TokenFFNConfig, linears: list[Any], n_tokens: int | None, d_model: int) -> int:
    assert n_tokens is not None
    old = channel.layer(d_model).width(d_model)
    before = {config.width(d_model) for config in linears}
    if len(before) > 1 or old * n_tokens % min(before):
        raise UserError(
            f"growth: linears have {sorted(before)} tokens and token_ffn has {old}, so n_tokens {n_tokens} gives no "
            "whole ratio; give ffn_tokens too"
        )
    return old * n_tokens // before.pop()


def grow_tensors(
    new: ModelConfig,
    tensors: dict[str, Tensor],
    *,
    tau: Scale = "keep",
    new_keys: NewKeys = "zero",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Parameters and buffers of the model `new`, from those of a smaller one by dotted name.

    tau: keep the stored scale, or set it to the square root of the new number of tokens, which changes outputs.
    new_keys: zero, or as at the start of a training. New values are always as at the start.
    """
    model = new.build("meta")
    layers = {clean_name(name): part for name, part in model.named_modules() if isinstance(part, Pattention)}
    tied = {"unembed.weight"} if new.head.tied else set()
    grown: dict[str, Tensor] = {}
    for name, target, init in init_specs(model):
        if name in grown or (name in tied and name not in tensors):
            continue
        if name not in tensors:
            raise UserError(f"growth: the checkpoint has no {name}; it is of another model")
        old, shape = tensors[name], tuple(target.shape)
        layer, _, own = name.rpartition(".")
        grows = layer in layers and own in ("keys", "values") and old.shape[1:] == shape[1:]
        if tuple(old.shape) != shape and not (grows and len(old) < shape[0]):
            raise UserError(
                f"growth: {name} has shape {list(old.shape)} and would get {list(shape)}; only parameter tokens are "
                "added, and none is taken away"
            )
        if layer in layers and own == "tau2" and tau == "sqrt_n":
            old = torch.full_like(old, len(layers[layer].keys))
        if len(shape) and len(old) < shape[0]:
            old = torch.cat(
                [old, _new_rows(name, len(old), shape, init, own == "keys" and new_keys == "zero", seed, old)]
            )
        grown[name] = old
    unknown = sorted(set(tensors) - set(grown))
    if unknown:
        raise UserError(
            f"growth: the checkpoint has {unknown[0]}, which the model does not know; it is of another model"
        )
    return grown


def _new_rows(name: str, n_old: int, shape: tuple[int, ...], init: Any, zero: bool, seed: int, like: Tensor) -> Tensor:
    if zero:
        return like.new_zeros(shape[0] - n_old, *shape[1:])
    rng = torch.Generator().manual_seed(name_seed(seed, f"{name} grown from {n_old}"))
    return init(shape, rng)[n_old:].to(like.dtype)


def grow_optimizer(
    before: dict[str, Tensor], after: dict[str, Tensor], optim: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Optimizer state of grown parameters: what belongs to old rows stays, new rows begin with zeros.

    before, after: parameters by name, for their shapes. optim: parameter name -> state name -> tensor.
    """

    def pad(name: str, value: Tensor) -> Tensor:
        n_old = before[name].shape[0] if before[name].dim() else 0
        n_new = after[name].shape[0] if after[name].dim() else 0
        if n_new == n_old or not value.dim() or value.shape[0] != n_old:
            return value
        return torch.cat([value, value.new_zeros(n_new - n_old, *value.shape[1:])])

    return {name: {key: pad(name, value) for key, value in slots.items()} for name, slots in optim.items()}
