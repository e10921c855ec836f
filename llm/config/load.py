"""Read a config: a YAML file that may compose others, then dotted overrides; written back as one resolved file.

The order of precedence, lowest first: the files of `compose` in their order, the file itself, the overrides.
Mappings are merged key by key, everything else is replaced. A mapping whose `type` differs from the one below it
replaces it whole, since the keys of one kind of part mean nothing to another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from llm.config.base import Config
from llm.config.messages import describe, format_path
from llm.config.migrations import VERSION_KEY, current_version, migrate
from llm.config.yaml_io import dump_yaml, read_yaml
from llm.core.errors import UserError, nearest

C = TypeVar("C", bound=Config)

COMPOSE_KEY = "compose"


def load_config(root: type[C], argv: Sequence[str] = ()) -> C:
    """The config described by command-line arguments: an optional path of a YAML file, then `key=value` overrides.

    A key is dotted, with list items by index: `model.layers.0.repeat=2`; a key that itself holds a dot is quoted in
    brackets: `model.tied["head.weight"]=embed.weight`. A value is YAML. Every mistake raises UserError.
    """
    path, overrides = split_arguments(argv)
    tree = read_tree(path, root.__name__) if path else {}
    for override in overrides:
        apply_override(tree, override)
    return validate(root, resolve(tree))


def validate(root: type[C], tree: dict[str, Any]) -> C:
    """A config from plain data in the current schema; every mistake in it is named in one UserError."""
    if VERSION_KEY in root.model_fields:
        tree = {VERSION_KEY: current_version(root.__name__)} | tree
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise UserError(describe(root, error, tree)) from error


def config_text(config: Config) -> str:
    """The resolved config as YAML with its schema version."""
    tree = _escape(config.to_dict())
    tree = {VERSION_KEY: current_version(type(config).__name__)} | {k: v for k, v in tree.items() if k != VERSION_KEY}
    return dump_yaml(tree)


def dump_config(config: Config, path: str | Path) -> None:
    """Write `config_text` in one step; `load_config(type(config), [path])` gives the config back."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(config_text(config), encoding="utf-8")
    os.replace(temporary, path)


def config_hash(config: Config) -> str:
    """16 hexadecimal digits that name the content of a config; equal for equal configs, in any process."""
    tree = {key: value for key, value in config.to_dict().items() if key != VERSION_KEY}
    text = json.dumps([type(config).__name__, tree], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_arguments(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """(path of the YAML file or None, overrides) of command-line arguments; UserError for anything else."""
    path: Path | None = None
    overrides: list[str] = []
    for index, argument in enumerate(argv):
        if argument.startswith("-"):
            key = argument.lstrip("-").split("=", 1)[0] or "key"
            raise UserError(f"unknown option {argument!r}; config values are given as key=value, such as {key}=VALUE")
        if "=" in argument and not (index == 0 and Path(argument).is_file()):
            overrides.append(argument)
        elif index == 0:
            path = Path(argument)
        else:
            raise UserError(
                f"unexpected argument {argument!r}; allowed: one YAML file first, then overrides written key=value"
            )
    return path, overrides


def read_tree(path: Path, kind: str, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The merged tree of a file and all that it composes, each brought to the current schema, not yet resolved."""
    here = path.resolve()
    if here in _above:
        chain = " -> ".join(step.name for step in (*_above[_above.index(here) :], here))
        raise UserError(f"{path}: {COMPOSE_KEY} goes in a circle: {chain}; remove one of these lines")
    if not path.is_file():
        raise UserError(_no_such_file(path, _above[-1] if _above else None))
    tree = migrate(read_yaml(path), kind, str(path))
    parts = tree.pop(COMPOSE_KEY, None) or []
    if isinstance(parts, str):
        parts = [parts]
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{path}: {COMPOSE_KEY} must be a list of file names relative to this file; given {parts!r}")
    merged: dict[str, Any] = {}
    for part in parts:
        merged = merge(merged, read_tree(path.parent / part, kind, (*_above, here)))
    return merge(merged, tree)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The tree `below` with the values of `above` over it."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_type(old, value):
            value = merge(old, value)
        merged[key] = value
    return merged


def _same_type(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "type" not in new or old.get("type", new["type"]) == new["type"]


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `key=value` in the tree, in place, making mappings on the way; UserError when the key is no path."""
    key, _, text = override.partition("=")
    path = parse_key(key.strip())
    if path[0] in (VERSION_KEY, COMPOSE_KEY):
        raise UserError(f"{path[0]} belongs in a YAML file; it cannot be given as an override (given {override!r})")
    value = read_yaml(text, name=f"override {override!r}")
    node: Any = tree
    for depth, step in enumerate(path):
        where = format_path(path[:depth])
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not step.isdecimal() or int(step) >= len(node):
                allowed = f"0 to {len(node) - 1}" if node else "none, the list is empty"
                raise UserError(
                    f"override {override!r}: {where} is a list, {step!r} is no index of it (allowed: {allowed})"
                )
            slot: Any = int(step)
        elif isinstance(node, dict):
            slot = _existing_key(node, step)
        else:
            raise UserError(
                f"override {override!r}: {where} is {node!r}, which has no keys; give {where}=VALUE instead"
            )
        if last:
            node[slot] = value
            return
        below = node[slot] if isinstance(node, list) else node.get(slot)
        if below is None:
            below = {}
        elif isinstance(below, str):
            below = {"type": below}
        node[slot] = dict(below) if isinstance(below, dict) else list(below) if isinstance(below, list) else below
        node = node[slot]


def _existing_key(node: dict[Any, Any], step: str) -> Any:
    """The key of `node` that prints as `step` (YAML keys may be numbers), else `step` itself."""
    return next((key for key in node if str(key) == step), step)


def parse_key(key: str) -> list[str]:
    """The steps of a dotted key: `a.0.b`, `a[0].b` and `a["x.y"].b` are all allowed."""
    steps: list[str] = []
    rest = key
    while rest:
        if rest[0] == "[":
            quote = rest[1:2] if rest[1:2] in ('"', "'") else ""
            end = rest.find(quote + "]", 1 + len(quote))
            if end < 0:
                break
            steps.append(rest[1 + len(quote) : end])
            rest = rest[end + len(quote) + 1 :]
            if rest[:1] == ".":
                rest = rest[1:] or "."
        else:
            end = min((at for at in (rest.find("."), rest.find("[")) if at >= 0), default=len(rest))
            if end == 0:
                break
            steps.append(rest[:end])
            rest = rest[end:]
            if rest[:1] == ".":
                rest = rest[1:] or "."
                if rest[0] == "[":
                    break
    if rest or not steps or not all(steps):
        raise UserError(f"{key!r} is no key of a config; write it dotted, such as model.layers.0.repeat")
    return steps


def resolve(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with `${...}` interpolations replaced by their values; UserError where one has none, or for `???`."""
    for path, value in _leaves(tree, []):
        if value == "???":
            raise UserError(f"config: {format_path(path)}: a value is required; give it as {format_path(path)}=VALUE")
    if not any(isinstance(value, str) and "${" in value for _, value in _leaves(tree, [])):
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"config: {where}{reason}; write \\${{ for a literal ${{") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _leaves(node: Any, path: list[str]) -> list[tuple[list[str], Any]]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in _leaves(value, [*path, str(key)])]
    if isinstance(node, list):
        return [leaf for index, value in enumerate(node) for leaf in _leaves(value, [*path, str(index)])]
    return [(path, node)]


def _escape(node: Any) -> Any:
    """The same data, such that `resolve` gives it back: no string of it is taken for an interpolation."""
    if isinstance(node, dict):
        return {key: _escape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escape(value) for value in node]
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", node)
    return node


def _no_such_file(path: Path, composed_by: Path | None) -> str:
    origin = f" (composed by {composed_by.name})" if composed_by else ""
    if path.is_dir():
        return f"{path}{origin} is a folder; give one of its YAML files"
    folder = path.parent
    if not folder.is_dir():
        return f"no such config file: {path}{origin}; the folder {folder} does not exist"
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    close = nearest(path.name, found, n=3) or nearest(path.with_suffix(".yaml").name, found, n=3)
    hint = f"; did you mean {' or '.join(str(folder / name) for name in close)}?" if close else ""
    return f"no such config file: {path}{origin}{hint} (found there: {', '.join(found[:12]) or 'no YAML file'})"
