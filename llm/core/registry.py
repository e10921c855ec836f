"""Registry: names of pluggable parts. An entry is a promise, and the contract suites are generated from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from llm.core.errors import UserError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """What the generated documentation says of a part, in Markdown.

    equation: what it computes, in plain text with Unicode symbols. use: when to take it. weakness: what it is bad at.
    """

    equation: str
    use: str
    weakness: str


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered part.

    tiny: builds the smallest config that still exercises the part; `tinies` lists further ones worth testing.
    paper: where the method comes from. about: its page in the documentation.
    exempt: contract name -> mathematical reason why that contract cannot hold. The documentation prints it.
    """

    name: str
    config: type[T]
    tiny: Callable[[], T]
    paper: str
    status: Literal["stable", "experimental"]
    aliases: tuple[str, ...] = ()
    tinies: dict[str, Callable[[], T]] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)
    about: About | None = None

    def variants(self) -> dict[str, Callable[[], T]]:
        """All tiny configs by label, the main one first."""
        return {self.name: self.tiny} | {f"{self.name}-{label}": make for label, make in self.tinies.items()}


class Registry(Generic[T]):
    """Maps a name, and its deprecated aliases, to the config class of a part."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}
        self._aliases: dict[str, str] = {}
        self._refused: dict[str, str] = {}

    def register(
        self,
        name: str,
        *,
        tiny: Callable[[], T],
        paper: str,
        status: Literal["stable", "experimental"] = "stable",
        aliases: tuple[str, ...] = (),
        tinies: dict[str, Callable[[], T]] | None = None,
        exempt: dict[str, str] | None = None,
        about: About | None = None,
    ) -> Callable[[type[Any]], type[Any]]:
        """Class decorator for a config class; a name that is already taken raises ValueError.

        aliases: former names, still accepted with a warning. Two names for one class would make its `type` ambiguous.
        """

        def add(config: type[Any]) -> type[Any]:
            if "type_name" in config.__dict__:
                raise ValueError(f"{config.__name__} is registered already, as {config.type_name!r}")
            if len({name, *aliases}) <= len(aliases):
                raise ValueError(f"{self.kind} {name!r} lists a name twice")
            for taken in (name, *aliases):
                if taken in self._entries or taken in self._aliases:
                    raise ValueError(f"{self.kind} {taken!r} is registered twice")
            self._entries[name] = Entry(name, config, tiny, paper, status, aliases, tinies or {}, exempt or {}, about)
            self._aliases.update(dict.fromkeys(aliases, name))
            config.type_name = name
            return config

        return add

    def entry(self, name: str) -> Entry[T]:
        """The entry of a name or alias; an unknown name raises UserError with the nearest one."""
        if name in self._aliases:
            message = f"{self.kind} {name!r} is now called {self._aliases[name]!r}; the old name will go"
            warnings.warn(message, FutureWarning, stacklevel=2)
        found = self._entries.get(self._aliases.get(name, name))
        if found is None and name in self._refused:
            raise UserError(f"{self.kind} {name!r} is not offered: {self._refused[name]}")
        if found is None:
            raise UserError(unknown_name(self.kind, name, self._entries))
        return found

    def get(self, name: str) -> type[T]:
        """The config class of a name or alias."""
        return self.entry(name).config

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._entries)

    def entries(self) -> list[Entry[T]]:
        """All entries, sorted by name."""
        return [self._entries[name] for name in self.names()]

    def refuse(self, name: str, reason: str) -> None:
        """Make known why a published part cannot be offered here; asking for it raises UserError with the reason, a
        phrase that says what to take instead."""
        if name in self._entries or name in self._aliases or name in self._refused:
            raise ValueError(f"{self.kind} {name!r} is known already")
        self._refused[name] = reason

    def refusals(self) -> dict[str, str]:
        """Name -> reason of the parts that are not offered."""
        return dict(sorted(self._refused.items()))

    def unregister(self, name: str) -> None:
        """Remove an entry; for tests that register a part of their own."""
        entry = self._entries.pop(name)
        del entry.config.type_name  # type: ignore[attr-defined]
        for alias in entry.aliases:
            del self._aliases[alias]
