"""Every registered part says what it is, when to use it, and how tensor parallelism splits it or why it does not."""

from __future__ import annotations

from typing import Any

import pytest

from llm.blocks.base import CHANNELS, LINEARS, MIXERS, NORMS, POSITIONS, RESIDUALS
from llm.models.wrappers.base import WRAPPERS
from llm.parallel.plan import plan_of

SPLIT = [entry for registry in (MIXERS, CHANNELS, LINEARS, WRAPPERS) for entry in registry.entries()]
ALL = [*SPLIT, *(entry for registry in (NORMS, POSITIONS, RESIDUALS) for entry in registry.entries())]


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
def test_about(entry: Any) -> None:
    about = entry.about
    assert about is not None, "register(..., about=About(equation=, use=, weakness=)) is missing"
    for text in (about.equation, about.use, about.weakness):
        assert len(text.split()) >= 3, text


@pytest.mark.parametrize("entry", SPLIT, ids=lambda entry: entry.name)
def test_plan(entry: Any) -> None:
    for config in (make() for make in entry.variants().values()):
        plan = plan_of(config)
        if plan.tp is None:
            assert len(plan.tp_refused.split()) >= 4, "a plan in llm/parallel/plans must split it or say why not"
        else:
            assert not plan.tp_refused
            assert set(plan.divides) <= set(type(config).model_fields)
