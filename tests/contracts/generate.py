"""Turns registries into pytest parameters: one case per entry, variant and contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from llm.core.registry import Entry
from tests.contracts.checks.exemptions import Check, check_exemptions, verify

SLOW = ("overfits", "compile")
"""Contracts that take seconds: the fast suite holds the main variant of each entry to them."""


def cases(checks: Mapping[str, Check], entries: Iterable[Entry[Any]]) -> list[Any]:
    """(checks, contract, entry, variant) for every contract of every variant, named variant-contract."""
    return [
        pytest.param(
            checks,
            name,
            entry,
            label,
            id=f"{label}-{name}",
            marks=[pytest.mark.slow] if name in SLOW and label != entry.name else [],
        )  # fmt: skip
        for entry in entries
        for label in entry.variants()
        for name in checks
    ]


def run_case(checks: Mapping[str, Check], name: str, entry: Entry[Any], label: str) -> None:
    """Check one contract; an exempt one is skipped, after its exemption has been looked at."""
    reason = verify(checks, name, entry, entry.variants()[label]())
    if reason is not None:
        pytest.skip(f"exempt: {reason}")


def run_exemptions(checks: Mapping[str, Check], entries: Iterable[Entry[Any]]) -> None:
    """The exemptions of all entries exist, give a reason and are needed."""
    for entry in entries:
        check_exemptions(checks, entry)
