"""Version checks speak plainly."""

from __future__ import annotations

import pytest
import torch

from llm.core import compat
from llm.core.errors import UserError


def test_the_running_torch_is_supported() -> None:
    assert compat.OLDEST_TORCH <= compat.torch_version() <= compat.NEWEST_TORCH
    compat.require_supported_torch()


@pytest.mark.parametrize(("text", "version"), [("2.11.0+cu130", (2, 11)), ("2.13.0a0+git1", (2, 13))])
def test_version_text(monkeypatch: pytest.MonkeyPatch, text: str, version: tuple[int, int]) -> None:
    monkeypatch.setattr(torch, "__version__", text)
    assert compat.torch_version() == version


def test_an_old_torch_is_refused_and_a_new_one_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(UserError, match=r"torch 2\.10\.1 is too old \(supported: 2\.11 to 2\.13\)"):
        compat.require_supported_torch()
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    with pytest.warns(UserWarning, match="newer than the tested releases"):
        compat.require_supported_torch()
