"""Choice of implementation for an operation: which one is used for a query, and why.

An operation has one `OpSpec` and several implementations; the reference is plain PyTorch, does everything, and is the
oracle of the others. `resolve` is called when a model is built or before a forward, never inside compiled code.

The choice may be forced for a process with the environment variable MANYFORMER_KERNELS: a policy ("reference"), an
implementation per operation ("attention=sdpa,rms_norm=reference"), or both, separated by commas; or with `configure`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Policy = Literal["auto", "triton", "reference"]
POLICIES: tuple[Policy, ...] = ("auto", "triton", "reference")
ENVIRONMENT = "MANYFORMER_KERNELS"

log = logging.getLogger("kernels")


class Unsupported(ValueError):
    """No permitted implementation can do what is asked; the message says why of each."""


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference from the reference: |a - b| <= atol * max(1, largest |b|) + rtol * |b|."""

    atol: float
    rtol: float

    def fault(self, name: str, found: Tensor, wanted: Tensor) -> str | None:
        """What to say when `found` is too far from `wanted`, or not finite; None when it is near enough."""
        wanted = wanted.double()
        difference = (found.double() - wanted).abs()
        allowed = self.atol * wanted.abs().max().clamp(min=1.0) + self.rtol * wanted.abs()
        if bool((difference <= allowed).all()):
            return None
        return f"{name} differs by {difference.max().item():.3g} where {allowed.max().item():.3g} is accepted"


@runtime_checkable
class Impl(Protocol):
    """One implementation. kind: what it is made of."""

    name: str
    kind: Literal["reference", "torch", "triton", "package"]

    def priority(self, query: Any) -> int:
        """The highest one that supports a query is taken."""

    def supports(self, query: Any) -> Literal[True] | str:
        """True, or the reason why not, as a phrase that ends an error message."""


@dataclass(frozen=True)
class OpSpec:
    """An operation. A query is a frozen dataclass with at least `device` (a type such as "cuda") and `dtype`.

    check(impl, query, device) runs the implementation and the reference on small inputs, values and gradients, and
    returns a description of the first difference beyond `tolerances`, or None.
    """

    name: str
    tolerances: Mapping[torch.dtype, Tolerance]
    check: Callable[[Any, Any, torch.device], str | None]
    impls: dict[str, Any] = field(default_factory=dict)

    def add(self, impl: Any) -> Any:
        """Register an implementation; a name that is taken is our bug."""
        assert impl.name not in self.impls, f"{self.name}: implementation {impl.name!r} is registered twice"
        self.impls[impl.name] = impl
        return impl

    @property
    def reference(self) -> Any:
        """The plain PyTorch twin."""
        return next(impl for impl in self.impls.values() if impl.kind == "reference")


@dataclass
class _Settings:
    policy: Policy = "auto"
    overrides: dict[str, str] = field(default_factory=dict)


_OPS: dict[str, OpSpec] = {}
_FOLDERS = ("attention", "cross_entropy", "delta_rule", "linear_attention", "memory_layer", "rms_norm")
_settings = _Settings()
_banned: dict[tuple[str, str], str] = {}
_cache: dict[tuple[Any, ...], Any] = {}
_said: set[str] = set()


def register_op(spec: OpSpec) -> OpSpec:
    """Make an operation known by its name."""
    assert spec.name not in _OPS, f"operation {spec.name!r} is registered twice"
    _OPS[spec.name] = spec
    return spec


def op(name: str) -> OpSpec:
    """The operation of a name; loads its folder on first use."""
    if name not in _OPS and name in _FOLDERS:
        importlib.import_module(f"kernels.{name}")
    if name not in _OPS:
        raise Unsupported(f"unknown operation {name!r} (allowed: {', '.join(sorted({*_FOLDERS, *_OPS}))})")
    return _OPS[name]


def configure(policy: Policy = "auto", overrides: Mapping[str, str] | None = None) -> None:
    """Set the policy and the implementation by operation for this process; the environment variable wins over both."""
    if policy not in POLICIES:
        raise Unsupported(f"unknown kernel policy {policy!r} (allowed: {', '.join(POLICIES)})")
    for name, impl in (overrides or {}).items():
        _known_impl(name, impl)
    _settings.policy, _settings.overrides = policy, dict(overrides or {})
    _cache.clear()


def ban(name: str, impl: str, reason: str) -> None:
    """Never choose an implementation again in this process (its self-test failed); says so once, loudly."""
    if op(name).impls[impl].kind == "reference":
        raise Unsupported(f"{name}: the reference itself failed: {reason}")
    _banned[name, impl] = reason
    _cache.clear()
    _say(logging.WARNING, f"{name}: {impl} is switched off and another implementation takes its place: {reason}")


def bans() -> dict[tuple[str, str], str]:
    """(operation, implementation) -> reason of each ban."""
    return dict(_banned)


def reset() -> None:
    """Forget bans, settings and what was said; for tests."""
    _banned.clear()
    _cache.clear()
    _said.clear()
    _settings.policy, _settings.overrides = "auto", {}


def resolve(name: str, query: Any, policy: Policy | None = None, backend: str | None = None) -> Any:
    """The implementation of operation `name` for a query.

    policy: auto takes the best one that supports the query; triton insists on a Triton kernel; reference takes the
    plain twin. backend: the name of one implementation to insist on. Raises Unsupported with the reasons.
    """
    environment = os.environ.get(ENVIRONMENT, "")
    key = (name, query, policy, backend, environment)
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = _resolve(op(name), query, policy, backend, environment)
    return found


def _resolve(spec: OpSpec, query: Any, policy: Policy | None, backend: str | None, environment: str) -> Any:
    env_policy, env_backends = parse_environment(environment)
    policy = env_policy or policy or _settings.policy
    backend = env_backends.get(spec.name) or backend or _settings.overrides.get(spec.name)
    if backend is not None and env_policy != "reference":
        impl = _known_impl(spec.name, backend)
        reason = obstacle(spec, impl, query)
        if reason is not None:
            raise Unsupported(f"{spec.name}: {backend} cannot be used: {reason}; choose another one or 'auto'")
        _report(spec, query, impl, [f"{backend} was asked for"])
        return impl
    kinds: Iterable[str] = {"auto": ("triton", "torch", "package", "reference")}.get(policy, (policy,))
    reasons: list[str] = []
    for impl in sorted(spec.impls.values(), key=lambda impl: -impl.priority(query)):
        if impl.kind not in kinds:
            continue
        reason = obstacle(spec, impl, query)
        if reason is None:
            _report(spec, query, impl, reasons)
            return impl
        reasons.append(f"{impl.name}: {reason}")
    raise Unsupported(f"{spec.name}: no implementation under policy {policy!r}: {'; '.join(reasons) or 'none exists'}")


def obstacle(spec: OpSpec, impl: Any, query: Any) -> str | None:
    """Why an implementation may not serve a query: a ban, a known fault or a missing ability; None when it may."""
    from kernels import known_bad

    if (spec.name, impl.name) in _banned:
        return f"switched off: {_banned[spec.name, impl.name]}"
    answer = impl.supports(query)
    if answer is not True:
        return str(answer)
    case = None if impl.kind == "reference" else known_bad.find(spec.name, impl.name, query.device)
    if case is None:
        return None
    _say(
        logging.WARNING,
        f"{spec.name}: {impl.name} is known to be wrong here and is not used: {case.what} ({case.link})",
    )
    return f"known to be wrong here: {case.what}"


def parse_environment(value: str) -> tuple[Policy | None, dict[str, str]]:
    """(policy, implementation by operation) of the environment variable's text."""
    policy: Policy | None = None
    backends: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, equals, impl = part.partition("=")
        if equals:
            _known_impl(name.strip(), impl.strip())
            backends[name.strip()] = impl.strip()
        elif part in POLICIES:
            policy = part  # type: ignore[assignment]
        else:
            raise Unsupported(
                f"{ENVIRONMENT}={value!r}: {part!r} is neither a policy ({', '.join(POLICIES)}) "
                "nor of the form operation=implementation"
            )
    return policy, backends


def _known_impl(name: str, impl: str) -> Any:
    spec = op(name)
    if impl not in spec.impls:
        raise Unsupported(f"unknown implementation {impl!r} of {name} (allowed: {', '.join(sorted(spec.impls))})")
    return spec.impls[impl]


def _report(spec: OpSpec, query: Any, impl: Any, reasons: list[str]) -> None:
    why = f" ({'; '.join(reasons)})" if reasons else ""
    dtype = str(query.dtype).removeprefix("torch.")
    _say(logging.INFO, f"{spec.name}: {impl.name} on {query.device} in {dtype}{why}")


def _say(level: int, text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.log(level, text)
