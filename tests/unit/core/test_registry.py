"""Registry: names, aliases, nearest names, duplicates."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from llm.core.errors import UserError, nearest, unknown_name
from llm.core.registry import Registry


def _filled() -> tuple[Registry[Any], type]:
    registry: Registry[Any] = Registry("mixer")

    @registry.register(
        "attention", tiny=lambda: 1, paper="Vaswani et al. 2017", aliases=("softmax",), tinies={"wide": lambda: 2}
    )
    class Attention:
        pass

    return registry, Attention


def _class() -> type:
    return type("Other", (), {})


def test_look_up_by_name() -> None:
    registry, attention = _filled()
    registry.register("retention", tiny=lambda: 3, paper="Sun et al. 2023")(_class())
    assert registry.get("attention") is attention
    assert attention.type_name == "attention"  # type: ignore[attr-defined]
    assert registry.names() == ["attention", "retention"]
    assert [entry.name for entry in registry.entries()] == registry.names()
    assert {label: make() for label, make in registry.entry("attention").variants().items()} == {
        "attention": 1,
        "attention-wide": 2,
    }


def test_an_alias_works_and_warns() -> None:
    registry, attention = _filled()
    with pytest.warns(FutureWarning, match="'softmax' is now called 'attention'"):
        assert registry.get("softmax") is attention
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.get("attention")


def test_an_unknown_name_gets_the_nearest() -> None:
    registry, _ = _filled()
    with pytest.raises(UserError, match="unknown mixer 'atention'; did you mean 'attention'.*allowed: attention"):
        registry.get("atention")
    with pytest.raises(UserError) as caught:
        registry.get("zzz")
    assert "did you mean" not in str(caught.value)
    assert unknown_name("mixer", "x", []) == "unknown mixer 'x' (allowed: none)"
    assert nearest("atention", ["retention", "attention"], n=2) == ["attention", "retention"]


@pytest.mark.parametrize(
    ("name", "aliases", "message"),
    [
        ("attention", (), "'attention' is registered twice"),
        ("softmax", (), "'softmax' is registered twice"),
        ("new", ("attention",), "'attention' is registered twice"),
        ("new", ("softmax",), "'softmax' is registered twice"),
        ("new", ("new",), "lists a name twice"),
        ("new", ("a", "a"), "lists a name twice"),
    ],
)
def test_a_taken_name_is_refused(name: str, aliases: tuple[str, ...], message: str) -> None:
    registry, _ = _filled()
    with pytest.raises(ValueError, match=message):
        registry.register(name, tiny=lambda: 0, paper="-", aliases=aliases)(_class())
    assert registry.names() == ["attention"]


def test_one_class_has_one_name() -> None:
    registry, attention = _filled()
    with pytest.raises(ValueError, match="registered already, as 'attention'"):
        registry.register("again", tiny=lambda: 0, paper="-")(attention)
    registry.register("special", tiny=lambda: 0, paper="-")(type("Special", (attention,), {}))
    assert attention.type_name == "attention"  # type: ignore[attr-defined]


def test_unregister_undoes_everything() -> None:
    registry, attention = _filled()
    registry.unregister("attention")
    assert registry.names() == []
    registry.register("softmax", tiny=lambda: 0, paper="-")(attention)
    assert registry.get("softmax") is attention


def test_a_refused_name_says_why() -> None:
    registry, _ = _filled()
    registry.refuse("linformer", "it is not causal; take attention")
    with pytest.raises(UserError, match="mixer 'linformer' is not offered: it is not causal; take attention"):
        registry.get("linformer")
    assert registry.refusals() == {"linformer": "it is not causal; take attention"}
    assert "linformer" not in registry.names()
    for taken in ("linformer", "attention", "softmax"):
        with pytest.raises(ValueError, match="known already"):
            registry.refuse(taken, "no")
