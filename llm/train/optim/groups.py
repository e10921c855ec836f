"""Which optimizer drives a parameter, at which learning rate and with which weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from llm.core.errors import UserError, nearest
from llm.core.init import clean_name
from llm.train.config import OptimConfig

Kind = Literal["adamw", "muon", "rowwise_adamw"]

EMBEDDINGS = ("embed.*", "position.*")
"""Parameters that are look-up tables: no weight decay by default, never Muon by default."""

TABLES = ("*.tables",)
"""Look-up tables inside blocks, whose rows do not act together as a matrix: never Muon by default."""


@dataclass(frozen=True)
class ParamRule:
    """What happens to one parameter: kind of optimizer, peak learning rate, decoupled weight decay."""

    kind: Kind
    lr: float
    weight_decay: float


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Clean dotted name -> trainable parameter; a tied one once, under its first name."""
    return {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=True) if p.requires_grad}


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Dotted prefixes of the model's blocks."""
    return tuple(f"{clean_name(name)}." for name, _ in model.blocks())  # type: ignore[operator]


def is_matrix(shape: Iterable[int]) -> bool:
    """Whether a shape is a matrix [rows, cols] or a stack of them [n, rows, cols] (experts) that Muon can take."""
    sizes = tuple(shape)
    return len(sizes) in (2, 3) and min(sizes[-2:]) > 1


def param_rules(
    shapes: dict[str, tuple[int, ...]], blocks: tuple[str, ...], optim: OptimConfig
) -> dict[str, ParamRule]:
    """The rule of each parameter. UserError for a glob of `optim.groups` that matches nothing or cannot be followed."""
    matched: set[str] = set()
    rules = {name: _rule(name, shape, blocks, optim, matched) for name, shape in shapes.items()}
    for index, group in enumerate(optim.groups):
        for glob in group.match:
            if not any(fnmatchcase(name, glob) for name in shapes):
                close = nearest(glob, shapes)
                hint = f"; a name that looks like it: {close[0]}" if close else ""
                raise UserError(f"optim.groups[{index}].match: {glob!r} matches no parameter of the model{hint}")
            if glob not in matched:
                raise UserError(
                    f"optim.groups[{index}].match: {glob!r} has no effect, since earlier groups take all that it "
                    "matches; put it before them or remove it"
                )
    return rules


def _rule(
    name: str, shape: tuple[int, ...], blocks: tuple[str, ...], optim: OptimConfig, matched: set[str]
) -> ParamRule:
    table = any(fnmatchcase(name, glob) for glob in EMBEDDINGS)
    matrix = is_matrix(shape) and not table and not any(fnmatchcase(name, glob) for glob in TABLES)
    kind: Kind = "muon" if optim.type == "muon" and name.startswith(blocks) and matrix else "adamw"
    weight_decay = 0.0 if len(shape) < 2 or table else optim.weight_decay
    lr_scale = 1.0
    for index, group in enumerate(optim.groups):
        hits = [glob for glob in group.match if fnmatchcase(name, glob)]
        if not hits:
            continue
        matched.update(hits)
        lr_scale = group.lr_scale
        weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
        kind = group.optimizer or kind
        if kind == "muon" and optim.type != "muon":
            raise UserError(f"optim.groups[{index}].optimizer=muon needs optim.type=muon (given: {optim.type})")
        if kind == "muon" and not is_matrix(shape):
            raise UserError(
                f"optim.groups[{index}].optimizer=muon matches {name} of shape {list(shape)}; Muon takes matrices "
                "only: narrow the glob"
            )
        if kind == "rowwise_adamw" and len(shape) < 2:
            raise UserError(
                f"optim.groups[{index}].optimizer=rowwise_adamw matches {name} of shape {list(shape)}, which has no "
                "rows: narrow the glob"
            )
        break
    lr = optim.lr if kind == "muon" or optim.type == "adamw" or optim.adam_lr is None else optim.adam_lr
    return ParamRule(kind, lr * lr_scale, weight_decay)


def grouped(named: dict[str, Any], rules: dict[str, ParamRule]) -> dict[ParamRule, dict[str, Any]]:
    """Entries of `named` by rule, in the order of the model."""
    groups: dict[ParamRule, dict[str, Any]] = {}
    for name, value in named.items():
        groups.setdefault(rules[name], {})[name] = value
    return groups
