"""Every registered linear against its contracts."""

from __future__ import annotations

from typing import Any

import pytest

from llm.blocks import base
from tests.contracts.checks import LINEAR_CHECKS
from tests.contracts.generate import cases, run_case, run_exemptions

ENTRIES = base.LINEARS.entries()


@pytest.mark.parametrize(("checks", "contract", "entry", "label"), cases(LINEAR_CHECKS, ENTRIES))
def test_contract(checks: Any, contract: str, entry: Any, label: str) -> None:
    run_case(checks, contract, entry, label)


def test_exemptions() -> None:
    run_exemptions(LINEAR_CHECKS, ENTRIES)
