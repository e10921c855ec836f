"""Drafters by name, as commands give them."""

from __future__ import annotations

import torch

from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.generate.draft_length import DraftLength
from llm.generate.drafters import Drafter, LookupDrafter, ModelDrafter, SelfDrafter
from llm.generate.load import load_model
from llm.models.decoder import Decoder
from llm.models.nesting import SliceOptions, at_widths, whole_widths
from llm.models.wrappers.base import Wrapper
from llm.models.wrappers.loop import Loop

KINDS = "lookup, lookup:N (matches of at most N tokens), lookup-tree:K (K branches), slice:1/4, loops:1, model:PATH"
LONGEST = 16


def make_drafter(
    text: str,
    model: Decoder | Wrapper,
    tokenizer: Tokenizer,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Drafter:
    """The drafter of a model that a word such as slice:1/4 names; `matformer` is another word for slice. UserError when
    the model has no such part, or the smaller model speaks other tokens."""
    kind, _, value = text.partition(":")
    if kind == "lookup":
        return LookupDrafter(_number(text, value) if value else 3)
    if kind == "lookup-tree":
        return LookupDrafter(n_branches=_number(text, value))
    if not value:
        raise UserError(f"cannot draft with {text!r}; allowed: {KINDS}")
    if kind in ("slice", "matformer"):
        widths = SliceOptions.model_validate({"slice": value}).of(model.config)
        if widths == whole_widths(model.config):
            raise UserError(f"{text} is the whole model, which drafts no faster than it decodes; give a smaller share")
        return SelfDrafter(model, lambda: at_widths(model, widths), text)
    if kind == "loops":
        loop = model if isinstance(model, Loop) else None
        if loop is None:
            raise UserError(f"{text} is for a looped model (wrapper loop, the outermost); this one is not")
        n_loops = _number(text, value)
        if n_loops >= loop.n_loops:
            raise UserError(f"{text}: the model itself makes {loop.n_loops} loops; draft with fewer")
        return SelfDrafter(model, lambda: loop.loops(n_loops), text)
    if kind == "model":
        small, theirs, _ = load_model(value, device=device, dtype=dtype)
        if theirs.pieces != tokenizer.pieces:
            raise UserError(f"the model in {value} has another tokenizer; drafts must be in the model's own tokens")
        return ModelDrafter(small, text)
    raise UserError(f"cannot draft with {text!r}; allowed: {KINDS}")


def make_draft_length(text: str) -> DraftLength:
    """A number of tokens, auto, or auto:N."""
    kind, _, value = text.partition(":")
    if kind == "auto":
        return DraftLength(_number(text, value) if value else LONGEST, adaptive=True)
    return DraftLength(_number(text, text))


def _number(text: str, value: str) -> int:
    if not value.isdigit() or not int(value):
        raise UserError(f"{text!r} needs a whole number of at least 1")
    return int(value)
