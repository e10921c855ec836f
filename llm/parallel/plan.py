"""Parallel plans: what a part wants of the strategies. A part's module knows nothing of meshes or ranks."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal, TypeVar

from torch import nn

from llm.config.base import Config

C = TypeVar("C")
TPStyle = Literal["colwise", "rowwise", "replicate"]


@dataclass(frozen=True)
class ParallelPlan:
    """tp: how tensor parallelism splits the linears of the part, name of a submodule (a glob) -> style: "colwise" by
    outputs, "rowwise" by inputs, "replicate". None with a sentence in `tp_refused`: the part runs with tp = 1 alone.
    divides: fields of the config that the number of tensor-parallel ranks must divide.

    fp32_params: globs of dotted parameter names, such as "*.router.weight", that stay fp32 in the forward pass of a
    bf16 run, since the part computes with them in fp32. ac_keep: operators whose results selective activation
    checkpointing keeps besides matrix products and attention, such as "aten.bmm"."""

    tp: Mapping[str, TPStyle] | None = None
    tp_refused: str = ""
    divides: tuple[str, ...] = ()
    fp32_params: tuple[str, ...] = ()
    ac_keep: frozenset[str] = frozenset()

    def __or__(self, other: ParallelPlan) -> ParallelPlan:
        globs = self.fp32_params + tuple(glob for glob in other.fp32_params if glob not in self.fp32_params)
        return ParallelPlan(fp32_params=globs, ac_keep=self.ac_keep | other.ac_keep)


_PLANS: dict[type, Callable[[Any], ParallelPlan]] = {}


def plan_for(config_type: type[C]) -> Callable[[Callable[[C], ParallelPlan]], Callable[[C], ParallelPlan]]:
    """Decorates fn(config) -> ParallelPlan for the config class of a part; they live in llm/parallel/plans."""

    def register(make: Callable[[C], ParallelPlan]) -> Callable[[C], ParallelPlan]:
        if config_type in _PLANS:
            raise ValueError(f"{config_type.__name__} has two parallel plans")
        _PLANS[config_type] = make
        return make

    return register


def plan_of(config: object) -> ParallelPlan:
    """The plan of one part; an empty one when none is registered."""
    _load_plans()
    make = _PLANS.get(type(config))
    return make(config) if make is not None else ParallelPlan()


def model_plan(model: nn.Module) -> ParallelPlan:
    """The plans of all parts of a model together, found by walking its config."""
    plan = ParallelPlan()
    stack: list[Any] = [getattr(model, "config", None)]
    while stack:
        value = stack.pop()
        if isinstance(value, Config):
            plan |= plan_of(value)
            stack += [getattr(value, name) for name in type(value).model_fields]
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
    return plan


def fp32_modules(model: nn.Module) -> list[nn.Module]:
    """Modules with a parameter of their own that the model's plan keeps in fp32, to be sharded apart from the rest."""
    globs = model_plan(model).fp32_params
    return [
        module
        for prefix, module in model.named_modules()
        if any(fnmatchcase(f"{prefix}.{name}", glob) for name in module._parameters for glob in globs)
    ]


@cache
def _load_plans() -> None:
    """Import every module of llm/parallel/plans, once."""
    from llm.parallel import plans

    for module in pkgutil.iter_modules(plans.__path__):
        importlib.import_module(f"{plans.__name__}.{module.name}")
