"""Schema versions of config trees, and the functions that bring an old tree up to the current one.

A kind of tree is named by its root class ("RunConfig"). Its migration number n turns version n into version n + 1 and
works on plain data, on a whole file or on a part that another file composes, so it must accept that keys are absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm.core.errors import UserError

Tree = dict[str, Any]
Migration = Callable[[Tree], Tree]

VERSION_KEY = "schema_version"

MIGRATIONS: dict[str, list[Migration]] = {}
"""Migrations of each kind of tree, oldest first. Kinds that never changed are absent."""


def current_version(kind: str) -> int:
    """The schema version that this code writes for a kind of tree: 1, plus one for each migration."""
    return 1 + len(MIGRATIONS.get(kind, ()))


def migrate(tree: Tree, kind: str, source: str) -> Tree:
    """The tree in the current schema, without its version key. A tree that states no version is current.

    source: the name of the file, for messages. Raises UserError when the version is no number or is newer than known.
    """
    tree = dict(tree)
    current = current_version(kind)
    version = tree.pop(VERSION_KEY, current)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{source}: {VERSION_KEY} must be a whole number from 1 to {current}; given {version!r}")
    if version > current:
        raise UserError(
            f"{source}: {VERSION_KEY} {version} is newer than this program knows ({current}); "
            "install a newer manyformer"
        )
    for step in MIGRATIONS.get(kind, [])[version - 1 :]:
        tree = step(tree)
    return tree
