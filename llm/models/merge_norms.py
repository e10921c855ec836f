"""Folding norms that training has made affine (`prep_bn`) into the linear layers that read them, for inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from llm.blocks.channels.activator import Activator
from llm.blocks.channels.gated import GatedChannel
from llm.blocks.channels.mlp import MLP
from llm.blocks.linears.dense import DenseLinear
from llm.blocks.mixers.attention import Attention
from llm.blocks.mixers.slab import SimplifiedLinearAttention
from llm.blocks.progressive_norm import ChannelAffine, PRepBN, fold_into_next
from llm.core.errors import UserError
from llm.models.block import Block

READERS: dict[type[nn.Module], tuple[str, ...]] = {
    Attention: ("q", "k", "v"),
    SimplifiedLinearAttention: ("q", "k", "v"),
    GatedChannel: ("gate", "up"),
    Activator: ("gate", "up"),
    MLP: ("up",),
}
"""Parts that read their input through these linear layers alone."""


def merge_norms(model: nn.Module) -> dict[str, str]:
    """Take every `prep_bn` out of a model in evaluation mode, in place, without changing an output but by rounding.

    A norm whose readers are all dense layers is folded into them; another becomes an affine map of its channels.
    Returns what became of each norm by name: the readers it went into, or "affine".
    """
    if model.training:
        raise UserError("norms are merged for inference only; call eval() on the model first")
    done: dict[str, str] = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            for norm, parts in _norms_of(block):
                _fold(done, f"{name}.residual.{norm}", block.residual, norm, _readers(parts))
        elif hasattr(block, "final_norm") and hasattr(block, "unembed"):
            head: Any = None if block.is_tied() else block.unembed  # type: ignore[operator]
            _fold(done, f"{name}.final_norm".lstrip("."), block, "final_norm", None if head is None else {"head": head})
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, PRepBN):
                setattr(module, child_name, ChannelAffine(*_affine(child)))
                done[f"{name}.{child_name}".lstrip(".")] = "affine"
    return done


def _norms_of(block: Block) -> Iterator[tuple[str, list[nn.Module]]]:
    """(name of a norm of the residual, the parts that read what it puts out)."""
    mixer, channel, residual = block.mixer, block.channel, block.residual
    if getattr(residual, "shared_norm", False):
        yield "mixer_norm", [part for part in (mixer, channel) if part is not None]
        return
    for name, part in (("mixer_norm", mixer), ("channel_norm", channel)):
        if part is not None:
            yield name, [part]


def _readers(parts: list[nn.Module]) -> dict[str, Any] | None:
    """Name -> dense layer for all that reads the input of these parts; None where something else reads it too."""
    found: dict[str, Any] = {}
    for part in parts:
        names = READERS.get(type(part))
        if names is None:
            return None
        found |= {name: getattr(part, name) for name in names}
    return found if all(type(linear) is DenseLinear for linear in found.values()) else None


def _fold(done: dict[str, str], name: str, owner: Any, attribute: str, readers: dict[str, Any] | None) -> None:
    norm = getattr(owner, attribute, None)
    if not isinstance(norm, PRepBN) or readers is None:
        return
    scale, shift = _affine(norm)
    for linear in readers.values():
        fold_into_next(linear, scale, shift)
    setattr(owner, attribute, nn.Identity())
    done[name] = ", ".join(readers)


def _affine(norm: PRepBN) -> tuple[Tensor, Tensor]:
    if norm.config.evaluate == "blended" and not norm.blend.is_meta and float(norm.blend) > 0:
        raise UserError(
            f"this norm is still {float(norm.blend):.2g} its inner norm, which is no affine map; train on until the "
            "blend has reached 0, or set evaluate: batch_norm"
        )
    scale, shift = norm.affine()
    return scale.detach(), shift.detach()
