"""The contracts as plain functions: call one with a tiny config, and it raises AssertionError where it is broken.

Every table maps a contract's name, which is also the key of a registry entry's `exempt`, to its function.
A package of blocks outside this project can run them on its own configs:

    from tests.contracts.checks import MIXER_CHECKS, verify
    for name in MIXER_CHECKS:
        verify(MIXER_CHECKS, name, entry, entry.tiny())
"""

from __future__ import annotations

from tests.contracts.checks.channels import CHANNEL_CHECKS
from tests.contracts.checks.exemptions import verify
from tests.contracts.checks.mixers import MIXER_CHECKS
from tests.contracts.checks.parts import LINEAR_CHECKS, NORM_CHECKS, POSITION_CHECKS, RESIDUAL_CHECKS

__all__ = [
    "CHANNEL_CHECKS",
    "LINEAR_CHECKS",
    "MIXER_CHECKS",
    "NORM_CHECKS",
    "POSITION_CHECKS",
    "RESIDUAL_CHECKS",
    "verify",
]
