"""Every registered mixer against its contracts."""

from __future__ import annotations

from typing import Any

import pytest

from llm.blocks import base
from tests.contracts.checks import MIXER_CHECKS
from tests.contracts.examples import EXAMPLES
from tests.contracts.generate import cases, run_case, run_exemptions

ENTRIES = [*base.MIXERS.entries(), *EXAMPLES.entries()]


@pytest.mark.parametrize(("checks", "contract", "entry", "label"), cases(MIXER_CHECKS, ENTRIES))
def test_contract(checks: Any, contract: str, entry: Any, label: str) -> None:
    run_case(checks, contract, entry, label)


@pytest.mark.slow
def test_exemptions() -> None:
    run_exemptions(MIXER_CHECKS, ENTRIES)
