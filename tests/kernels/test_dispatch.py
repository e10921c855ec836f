"""Choice of implementation: priorities, policies, overrides, bans, known faults, and the self-test."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import dispatch, known_bad
from kernels.dispatch import ENVIRONMENT, OpSpec, Unsupported, resolve
from kernels.selftest import cache_key, selftest


@dataclasses.dataclass(frozen=True)
class Query:
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    size: int = 1


class Made:
    """An implementation whose answers are given."""

    def __init__(
        self, name: str, kind: str, priority: int, answer: bool | str = True, fault: str | Exception = ""
    ) -> None:
        self.name, self.kind, self.rank, self.answer, self.fault = name, kind, priority, answer, fault

    def priority(self, query: Query) -> int:
        return self.rank

    def supports(self, query: Query) -> bool | str:
        return self.answer


@pytest.fixture
def calls() -> list[str]:
    """Names of the implementations that were checked, in order."""
    return []


@pytest.fixture
def spec(calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[OpSpec]:

    def check(impl: Made, query: Query, device: torch.device) -> str | None:
        calls.append(impl.name)
        if isinstance(impl.fault, Exception):
            raise impl.fault
        return impl.fault or None

    made = OpSpec("toy", {}, check)
    made.add(Made("plain", "reference", 0))
    made.add(Made("good", "torch", 10))
    made.add(Made("fast", "triton", 20))
    made.add(Made("picky", "torch", 30, "only for large sizes"))
    monkeypatch.setitem(dispatch._OPS, "toy", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    dispatch.reset()
    yield made
    dispatch.reset()


def test_policies(spec: OpSpec) -> None:
    assert resolve("toy", Query()).name == "fast"
    assert resolve("toy", Query(), "reference").name == "plain"
    assert resolve("toy", Query(), "triton").name == "fast"
    assert resolve("toy", Query(), backend="good").name == "good"
    spec.impls["fast"].answer = "no GPU"
    assert resolve("toy", Query(size=2)).name == "good"
    with pytest.raises(Unsupported, match="no GPU"):
        resolve("toy", Query(size=2), "triton")
    with pytest.raises(Unsupported, match="only for large sizes"):
        resolve("toy", Query(), backend="picky")
    with pytest.raises(Unsupported, match="unknown implementation 'fats'.*allowed: fast, good"):
        resolve("toy", Query(), backend="fats")
    with pytest.raises(Unsupported, match="unknown operation"):
        resolve("toys", Query())


def test_environment_wins_over_configure_and_arguments(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.configure("auto", {"toy": "good"})
    assert resolve("toy", Query()).name == "good"
    monkeypatch.setenv(ENVIRONMENT, "toy=fast")
    assert resolve("toy", Query()).name == "fast"
    assert resolve("toy", Query(), backend="good").name == "fast"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert resolve("toy", Query()).name == "plain"
    for bad in ("fastest", "toy=quick", "tools=fast"):
        monkeypatch.setenv(ENVIRONMENT, bad)
        with pytest.raises(Unsupported):
            resolve("toy", Query())


def test_configure_refuses_what_does_not_exist(spec: OpSpec) -> None:
    with pytest.raises(Unsupported, match="policy"):
        dispatch.configure("fastest")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="unknown implementation"):
        dispatch.configure("auto", {"toy": "quick"})


def test_choice_is_logged_once(spec: OpSpec, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kernels")
    for _ in range(3):
        resolve("toy", Query())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["toy: fast on cpu in float32 (picky: only for large sizes)"]


def test_known_bad_falls_back_loudly(
    spec: OpSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = known_bad.BadCase(
        "toy", "fast", "torch", "2.0", "99", frozenset({"cpu"}), "wrong sums", "https://example.org/1", "2026-01"
    )
    monkeypatch.setattr(known_bad, "KNOWN_BAD", [case])
    assert resolve("toy", Query()).name == "good"
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(loud) == 1 and "wrong sums" in loud[0].getMessage() and "example.org" in loud[0].getMessage()
    with pytest.raises(Unsupported, match="wrong sums"):
        resolve("toy", Query(), backend="fast")
    for other in (
        dataclasses.replace(case, below="2.1"),
        dataclasses.replace(case, archs=frozenset({"sm90"})),
        dataclasses.replace(case, package="no-such-package"),
    ):
        monkeypatch.setattr(known_bad, "KNOWN_BAD", [other])
        dispatch.reset()
        assert resolve("toy", Query()).name == "fast", other


def test_version_parsing() -> None:
    assert known_bad.parse("2.11.0+cu130") == (2, 11, 0)
    assert known_bad.parse("3.7") < known_bad.parse("3.7.1") < known_bad.parse("3.10")
    assert known_bad.parse("2.9.0a0") == (2, 9, 0)


@pytest.mark.parametrize("fault", ["output differs by 3", RuntimeError("no kernel image\nis available")])
def test_selftest_bans_what_fails(spec: OpSpec, caplog: pytest.LogCaptureFixture, fault: str | Exception) -> None:
    spec.impls["fast"].fault = fault
    report = selftest([("toy", Query())], "cpu")
    assert set(report.failed) == {("toy", "fast")} and len(report.checked) == 2
    assert str(fault).splitlines()[0] in report.line()
    assert resolve("toy", Query()).name == "good"
    assert any(record.levelno == logging.WARNING and "switched off" in record.getMessage() for record in caplog.records)
    dispatch.reset()
    again = selftest([("toy", Query())], "cpu")
    assert not again.checked and set(again.failed) == {("toy", "fast")}, "a cached failure is a failure"


def test_selftest_is_cached_by_key(spec: OpSpec, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    selftest([("toy", Query())], "cpu")
    selftest([("toy", Query())], "cpu")
    assert calls == ["fast"]
    selftest([("toy", Query(size=2))], "cpu")
    assert calls == ["fast", "fast"]
    before = cache_key(torch.device("cpu"))
    monkeypatch.setattr("kernels.selftest.source_hash", lambda: "other source")
    assert cache_key(torch.device("cpu")) != before
    selftest([("toy", Query())], "cpu")
    assert len(calls) == 3
    assert not selftest([("toy", Query())], "meta").checked


def test_selftest_survives_a_broken_cache(spec: OpSpec, tmp_path: Path) -> None:
    selftest([("toy", Query())], "cpu")
    (file,) = (tmp_path / "manyformer" / "selftest").iterdir()
    file.write_text("{broken")
    assert len(selftest([("toy", Query())], "cpu").checked) == 1


def test_selftest_leaves_random_numbers_alone() -> None:
    from kernels.attention import AttentionForm, AttentionQuery

    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    selftest(
        [("attention", AttentionQuery("cpu", torch.float32, AttentionForm(2, 2, 16, 0.25), "packed"))],
        "cpu",
        cache=False,
    )
    assert torch.equal(torch.rand(1), wanted)


def test_importing_kernels_stays_light(repo_root: Path) -> None:
    """transformers looks into a package of this name: it must not pull in anything heavy, nor our own llm."""
    code = "import sys, kernels; sys.exit(str({'torch', 'llm', 'triton'} & set(sys.modules) or '') or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
