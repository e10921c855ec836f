"""Every registered channel against its contracts."""

from __future__ import annotations

from typing import Any

import pytest

from llm.blocks import base
from tests.contracts.checks import CHANNEL_CHECKS
from tests.contracts.generate import cases, run_case, run_exemptions

ENTRIES = base.CHANNELS.entries()


@pytest.mark.parametrize(("checks", "contract", "entry", "label"), cases(CHANNEL_CHECKS, ENTRIES))
def test_contract(checks: Any, contract: str, entry: Any, label: str) -> None:
    run_case(checks, contract, entry, label)


@pytest.mark.slow
def test_exemptions() -> None:
    run_exemptions(CHANNEL_CHECKS, ENTRIES)
