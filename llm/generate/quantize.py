"""The matrices of a trained model in eight bits a weight (torchao); what is computed with them keeps the model's dtype.

Each row of a matrix [d_out, d_in] has one fp32 scale: W = scale * q with q int8 and scale = max |W| / 127.5, or with q
float8_e4m3fn and scale = max |W| / 448. Embeddings, the output head, norms, biases and convolutions stay as they are,
and so do routers, gates and other outputs that are narrow: they steer a choice or a state and take few bytes.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch

from llm.blocks.linears.dense import is_quantized
from llm.core.errors import UserError
from llm.core.init import clean_name
from llm.models.decoder import Decoder
from llm.models.wrappers.base import Wrapper

Quantize = Literal["none", "int8", "fp8"]

STEERING = {"router", "gates"}
"""Parts whose matrices stay as they are, however wide."""

NARROW = 8
"""A matrix whose outputs are so many times fewer than the model's width stays as it is."""


SHOWN = 6
"""Names of what stays as it is, in one line."""


class Quantized(NamedTuple):
    """names: matrices that have eight bits now. left: other parameters of two dimensions and more, under one name for
    all layers, the largest first. bytes_before, bytes_after: of all parameters."""

    how: str
    names: list[str]
    left: list[str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        shown = ", ".join(self.left[:SHOWN]) + (f" and {len(self.left) - SHOWN} more" if len(self.left) > SHOWN else "")
        left = f"; as before: {shown}" if self.left else ""
        sizes = f"{self.bytes_after / 1e6:,.2f} MB instead of {self.bytes_before / 1e6:,.2f} MB"
        return f"quantize={self.how}: {len(self.names)} matrices in 8 bits, all weights take {sizes}{left}"


def quantize_model(model: Decoder | Wrapper, how: Literal["int8", "fp8"]) -> Quantized:
    """Put the matrices of a model into eight bits, in place and for inference alone. UserError where torchao is
    missing, the device has no such numbers, or there is nothing to quantise."""
    if how not in ("int8", "fp8"):
        raise UserError(f"quantize is {how!r}; allowed: {', '.join(get_args(Quantize))}")
    _check_device(how, next(model.parameters()).device)
    chosen = list(_matrices(model))
    if not chosen:
        raise UserError(f"quantize={how}: this model has no dense matrices that could be quantised; leave quantize out")
    before = parameter_bytes(model)
    torchao = _torchao()
    kind = torchao.Int8WeightOnlyConfig if how == "int8" else torchao.Float8WeightOnlyConfig
    for _, owner, part in chosen:
        owner.get_parameter(part).data = owner.get_parameter(part).data.contiguous()  # rows may have lain apart
    names = [name for name, _, _ in chosen]
    config = torchao.FqnToConfig(dict.fromkeys(names, kind(set_inductor_config=False)))
    torchao.quantize_(model, config, filter_fn=None)
    for _, owner, _ in chosen:
        owner.quantized, owner.may_join, owner.joined = True, False, None
    left: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not is_quantized(parameter):
            left[_of_all_layers(name)] += parameter.nbytes
    large_first = [name for name, _ in left.most_common()]
    return Quantized(how, [clean_name(name) for name in names], large_first, before, parameter_bytes(model))


def parameter_bytes(model: Any) -> int:
    """Bytes of all parameters of a model, each once; of quantised ones with their scales."""
    return sum(part.nbytes for parameter in model.parameters() for part in _stored(parameter))


def _check_device(how: str, device: torch.device) -> None:
    if how == "fp8" and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        raise UserError(
            f"quantize=fp8 needs a GPU that has 8-bit floats (compute capability 8.9); this one has {found[0]}."
            f"{found[1]}; take quantize=int8"
        )


def _stored(parameter: Any) -> list[torch.Tensor]:
    """The tensors that hold a parameter."""
    if not is_quantized(parameter):
        return [parameter]
    parts = (parameter.qdata, parameter.scale, getattr(parameter, "zero_point", None))
    return [part for part in parts if part is not None]


def _matrices(model: Decoder | Wrapper) -> Iterator[tuple[str, Any, str]]:
    """(name of a parameter that is to have eight bits, module that owns it, name there)."""
    for name, module in model.named_modules():
        if STEERING & set(name.split(".")):
            continue
        for part in getattr(module, "matrices", ()):
            weight = module.get_parameter(part)
            if weight.shape[-2] * NARROW > model.config.d_model:
                yield f"{name}.{part}", module, part


def _of_all_layers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", clean_name(name))


def _torchao() -> Any:
    """torchao.quantization; UserError where it is not installed."""
    # It tells of GPU libraries that do not load here, and torch of a registration of torchao's that will go.
    noisy = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    # Of its tensors torch's cache of compiled code asks for what they do not have, and does without.
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
    try:
        import torchao.quantization
    except ImportError as error:
        raise UserError(f"quantize needs torchao ({error}): pip install 'manyformer[quantize]'") from error
    finally:
        for logger, level in zip(noisy, levels):
            logger.setLevel(level)
    return torchao.quantization
