"""Self-test: what a run is going to use is compared with the reference on the live device before it is trusted.

An implementation that fails is banned, so that the next one takes its place. Results are kept in the user's cache
folder under a key of device, driver, versions and the source of this package.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels import dispatch

log = logging.getLogger("kernels")


@dataclass
class Report:
    """seconds: time of the checks made now. checked, cached: what was compared now, or earlier with the same key.
    failed: (operation, implementation) -> what was wrong."""

    seconds: float = 0.0
    checked: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the log."""
        bad = "; ".join(f"{op}: {impl} {what}" for (op, impl), what in self.failed.items())
        verdict = f"{len(self.failed)} failed ({bad})" if bad else "all right"
        counts = f"{len(self.checked)} checked, {len(self.cached)} known from before"
        return f"kernel self-test: {counts}, {verdict}, {self.seconds:.1f} s"


def selftest(requests: Iterable[tuple[str, Any]], device: torch.device | str, *, cache: bool = True) -> Report:
    """Check the implementation that `dispatch.resolve` gives for each (operation, query), and ban those that fail.

    After a ban the next choice is checked as well. The reference is not checked against itself. On a device without
    values ("meta") nothing is done.
    """
    device = torch.device(device)
    report = Report()
    if device.type == "meta":
        return report
    known = _read(device) if cache else {}
    started = time.perf_counter()
    for name, query in requests:
        while True:
            impl = dispatch.resolve(name, query)
            if impl.kind == "reference":
                break
            label = _label(name, impl.name, query)
            fault = known.get(label, "") if label in known else _check(name, impl, query, device)
            (report.cached if label in known else report.checked).append(label)
            known[label] = fault
            if not fault:
                break
            report.failed[name, impl.name] = fault
            dispatch.ban(name, impl.name, f"self-test failed on {device}: {fault}")
    report.seconds = time.perf_counter() - started
    if cache and report.checked:
        _write(device, known)
    if report.checked or report.failed:
        log.log(logging.WARNING if report.failed else logging.INFO, report.line())
    return report


def _check(name: str, impl: Any, query: Any, device: torch.device) -> str:
    """What is wrong, or an empty text. A kernel that cannot even run is wrong; whatever it raises is the report."""
    state = torch.random.get_rng_state()
    try:
        fault = dispatch.op(name).check(impl, query, device) or ""
    except Exception as error:
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    torch.random.set_rng_state(state)
    return fault


def _label(name: str, impl: str, query: Any) -> str:
    fields = {f.name: str(getattr(query, f.name)) for f in dataclasses.fields(query)}
    return f"{name}/{impl}/{json.dumps(fields, sort_keys=True)}"


def cache_dir() -> Path:
    """Where results are kept: $XDG_CACHE_HOME or ~/.cache, folder manyformer/selftest."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "manyformer" / "selftest"


def cache_key(device: torch.device) -> str:
    """Equal as long as nothing that could change a result has changed."""
    facts = [platform.platform(), platform.processor(), sys.version.split()[0], torch.__version__, source_hash()]
    if device.type == "cuda":
        facts += [torch.cuda.get_device_name(device), str(torch.version.cuda), _driver()]
    for package in ("triton", "flash_attn"):
        module = sys.modules.get(package)
        facts.append(f"{package} {getattr(module, '__version__', None)}")
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:24]


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else ""


@functools.cache
def source_hash() -> str:
    """Hash of every source file of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(device: torch.device) -> dict[str, str]:
    path = cache_dir() / f"{cache_key(device)}.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(device: torch.device, known: dict[str, str]) -> None:
    path = cache_dir() / f"{cache_key(device)}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=0))
        partial.replace(path)
    except OSError as error:
        log.info("kernel self-test: results could not be kept in %s: %s", path.parent, error)
