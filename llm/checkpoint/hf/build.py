"""A decoder from a config and loaded tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm.core.errors import UserError, nearest
from llm.core.init import clean_name, copy_full, init_specs
from llm.models.config import ModelConfig
from llm.models.decoder import Decoder
from llm.models.wrappers.base import Wrapper


def build_model(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    source: str = "the checkpoint",
) -> Decoder | Wrapper:
    """The model in evaluation mode, its parameters taken from `tensors` (dotted name -> full tensor).

    Strict: a missing, unknown or wrongly shaped tensor raises UserError, which names it and `source`. Buffers that are
    not given are computed. A tied head may be given or left out; if given it must equal the embedding.
    """
    model = config.build("meta")
    check_tensors(model, tensors, source)
    model = model.to(dtype).to_empty(device=device)
    model.tie()
    done: set[int] = set()
    rng = torch.Generator()
    with torch.no_grad():
        for name, tensor, init in init_specs(model):
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            copy_full(tensor, tensors[name] if name in tensors else init(tuple(tensor.shape), rng))
    return model.eval()


def check_tensors(model: Decoder | Wrapper, tensors: Mapping[str, Tensor], source: str) -> None:
    """UserError unless `tensors` are just the parameters of `model`; buffers may be given or not."""
    buffers = {clean_name(name) for name, _ in model.named_buffers()}
    expected = {name: tensor for name, tensor, _ in init_specs(model)}
    optional = buffers | ({"unembed.weight"} if model.config.head.tied else set())
    missing = sorted(set(expected) - set(tensors) - optional)
    if missing:
        raise UserError(f"{source}: {_count(missing)} missing: {_some(missing)}; it does not fit its config")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        close = nearest(unknown[0], expected)
        hint = f" (nearest known name: {close[0]})" if close else ""
        raise UserError(
            f"{source}: {_count(unknown)} unknown to the model: {_some(unknown)}{hint}; it does not fit its config"
        )
    for name, tensor in tensors.items():
        want, given = tuple(expected[name].shape), tuple(tensor.shape)
        if want != given:
            raise UserError(f"{source}: tensor {name} has shape {list(given)}, the config asks for {list(want)}")
    if model.config.head.tied and "unembed.weight" in tensors:
        if not torch.equal(tensors["unembed.weight"], tensors["embed.weight"]):
            raise UserError(f"{source}: the head is tied in the config, but unembed.weight differs from embed.weight")


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
