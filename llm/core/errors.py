"""Errors meant for users: one readable line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config or an input. The message names what was given, what is allowed and what to do."""


def nearest(name: str, allowed: Iterable[str], *, n: int = 1) -> list[str]:
    """Names in `allowed` that look like `name`, best first; empty when none comes near."""
    return difflib.get_close_matches(name, list(allowed), n=n, cutoff=0.5)


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> str:
    """The text of an 'unknown name' error: what was given, the nearest valid name and all valid names."""
    allowed = sorted(allowed)
    close = nearest(given, allowed)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {given!r}{hint} (allowed: {', '.join(allowed) or 'none'})"
