"""Known faults: implementations that are wrong on certain versions and devices, kept out by `dispatch.resolve`.

A case is added with the issue that shows it and is removed when no supported version has it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BadCase:
    """op and impl: what is wrong. package: whose version decides, with `below` and `from_` bounding it (half open).

    archs: CUDA compute capabilities such as "sm90"; empty: all devices. what: one phrase. link: an issue. since: date.
    """

    op: str
    impl: str
    package: str
    from_: str
    below: str
    archs: frozenset[str]
    what: str
    link: str
    since: str


KNOWN_BAD: list[BadCase] = []


def find(op: str, impl: str, device: str) -> BadCase | None:
    """The case that forbids an implementation on the running versions and device, if any."""
    for case in KNOWN_BAD:
        if case.op != op or case.impl != impl:
            continue
        if case.archs and arch(device) not in case.archs:
            continue
        version = installed(case.package)
        if version is not None and parse(case.from_) <= version < parse(case.below):
            return case
    return None


def arch(device: str) -> str:
    """ "sm90" and the like for CUDA, else the device type."""
    if device != "cuda" or not torch.cuda.is_available():
        return device
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


@functools.cache
def installed(package: str) -> tuple[int, ...] | None:
    """Version of a package as numbers, or None when it is not installed."""
    if package == "torch":
        return parse(torch.__version__)
    try:
        return parse(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def parse(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(char for char in part if char.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
