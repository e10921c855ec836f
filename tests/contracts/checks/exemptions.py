"""Exemptions come from the registry entry alone, say why, and must be needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llm.core.registry import Entry

Check = Callable[[Any], None]


def verify(checks: Mapping[str, Check], name: str, entry: Entry[Any], config: Any) -> str | None:
    """Run one contract on a config of an entry; returns the reason where the entry is exempt from it."""
    reason = entry.exempt.get(name)
    if reason is None:
        checks[name](config)
    return reason


def check_exemptions(checks: Mapping[str, Check], entry: Entry[Any]) -> None:
    """Exempt contracts exist, each reason is a sentence, and for each some variant really breaks the contract."""
    for name, reason in entry.exempt.items():
        assert name in checks, f"{entry.name} is exempt from {name!r}, which is no contract ({', '.join(checks)})"
        sentence = len(reason.split()) >= 4 and reason.rstrip().endswith(".")
        assert sentence, f"{entry.name}: the exemption from {name} must give its reason in a sentence, not {reason!r}"
        assert not all(_holds(checks[name], make()) for make in entry.variants().values()), (
            f"{entry.name} is exempt from {name}, yet all its variants pass; remove the exemption"
        )


def _holds(check: Check, config: Any) -> bool:
    try:
        check(config)
    except (AssertionError, RuntimeError, NotImplementedError, ValueError):
        return False
    return True
