"""Validation errors of a config tree as readable lines: dotted path, what is wrong, what was given, what is allowed."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from llm.config.base import Config, Tagged
from llm.core.errors import nearest

MAX_PROBLEMS = 8

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
    "none_required": "null",
}

_SYNONYMS = {
    "hidden_size": "d_model",
    "n_embd": "d_model",
    "dim": "d_model",
    "intermediate_size": "d_hidden",
    "ffn_dim": "d_hidden",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "block_size": "max_seq_len",
    "rope_theta": "theta",
    "learning_rate": "lr",
    "wd": "weight_decay",
}


def describe(root: type[Config], error: ValidationError, tree: Any) -> str:
    """All problems of a ValidationError as one message: one line, or one line each when there are several.

    tree: the plain data that was validated against `root`.
    """
    grouped: dict[tuple[str, ...], list[_Problem]] = {}
    for problem in _flatten(error, tree, ()):
        grouped.setdefault(problem.path, []).append(problem)
    lines = [_line(root, path, problems) for path, problems in grouped.items()]
    if len(lines) == 1:
        return f"config: {lines[0]}"
    shown = lines[:MAX_PROBLEMS]
    if len(lines) > MAX_PROBLEMS:
        shown.append(f"... and {len(lines) - MAX_PROBLEMS} more")
    return "\n  ".join([f"config: {len(lines)} problems", *shown])


def format_path(path: Sequence[str]) -> str:
    """Steps as a dotted path: list items in brackets, keys that hold a dot in quotes: a.b[0]["x.y"]."""
    text = ""
    for step in path:
        if step.isdecimal():
            text += f"[{step}]"
        elif "." in step or "[" in step or not step:
            text += f'["{step}"]'
        else:
            text += f".{step}" if text else step
    return text


def dotted_names(root: type[Config], _above: tuple[type[Config], ...] = ()) -> Iterator[str]:
    """The full dotted names of all fields below a config class, registered parts included.

    `N` stands for an index, `KEY` for a key of a mapping. A class that contains itself is entered once.
    """
    for name, field in root.model_fields.items():
        yield name
        for prefix, below in _configs_in(field.annotation, name):
            if below not in _above and below is not root:
                for inner in dotted_names(below, (*_above, root)):
                    yield f"{prefix}.{inner}"


def _configs_in(annotation: Any, prefix: str) -> Iterator[tuple[str, type[Config]]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        registry = annotation.__dict__.get("registry") if issubclass(annotation, Tagged) else None
        if registry is None:
            yield prefix, annotation
        else:
            for entry in registry.entries():
                yield prefix, entry.config
        return
    origin = typing.get_origin(annotation)
    if origin in (list, tuple, set, frozenset, Sequence):
        prefix = f"{prefix}.N"
    elif origin in (dict, Mapping):
        prefix = f"{prefix}.KEY"
    for argument in typing.get_args(annotation):
        yield from _configs_in(argument, prefix)


class _Problem:
    """One pydantic error with its full path."""

    def __init__(self, path: tuple[str, ...], kind: str, message: str, given: Any, context: dict[str, Any]) -> None:
        self.path, self.kind, self.message, self.given, self.context = path, kind, message, given, context


def _flatten(error: ValidationError, tree: Any, prefix: tuple[str, ...]) -> Iterator[_Problem]:
    """The errors of `error` and of those nested in it. `tree` is the data below `prefix`."""
    for item in error.errors(include_url=False):
        context = item.get("ctx", {})
        path = prefix + _real_path(item["loc"], tree, missing=item["type"] == "missing")
        given = item["input"]
        if item["type"] == "nested" and isinstance(context.get("inner"), ValidationError):
            yield from _flatten(context["inner"], {"type": given} if isinstance(given, str) else given, path)
        elif item["type"] == "unknown_key":
            key = context["key"]
            value = next((v for k, v in given.items() if str(k) == key), None) if isinstance(given, dict) else None
            yield _Problem((*path, key), "unknown_key", item["msg"], value, context)
        else:
            yield _Problem(path, item["type"], item["msg"], given, context)


def _real_path(location: tuple[int | str, ...], tree: Any, *, missing: bool) -> tuple[str, ...]:
    """A pydantic location without the labels of union members and validators, which are no keys of the data."""
    path: list[str] = []
    for position, step in enumerate(location):
        if isinstance(tree, Mapping) and step in tree:
            tree = tree[step]
        elif isinstance(tree, (list, tuple)) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
        elif isinstance(tree, Config) and isinstance(step, str) and step in type(tree).model_fields:
            tree = getattr(tree, step)
        elif missing and position == len(location) - 1:
            pass
        else:
            continue
        path.append(str(step))
    return tuple(path)


def _line(root: type[Config], path: tuple[str, ...], problems: list[_Problem]) -> str:
    where = format_path(path)
    start = f"{where}: " if where else ""
    first = problems[0]
    if first.kind == "unknown_key":
        return start + _unknown_key(root, path, first)
    if first.kind == "missing":
        return f"{start}required, but not given; give it as {where}=VALUE or in the YAML file"
    if len(problems) == 1 and first.kind == "value_error":
        return start + str(first.context.get("error", first.message))
    expected = dict.fromkeys(_expected(problem) for problem in problems)
    hint = ""
    choices = [word.strip("'") for problem in problems for word in _literals(problem)]
    if isinstance(first.given, str) and choices and (close := nearest(first.given, choices)):
        hint = f"; did you mean {close[0]!r}?"
    allowed = " or ".join(expected).replace(" or must be ", " or ")
    return f"{start}{allowed}; given {show(first.given)}{hint}"


def _literals(problem: _Problem) -> list[str]:
    if problem.kind not in ("literal_error", "enum"):
        return []
    return str(problem.context.get("expected", "")).replace(" or ", ", ").split(", ")


def _expected(problem: _Problem) -> str:
    if problem.kind in _EXPECTED:
        return f"must be {_EXPECTED[problem.kind]}"
    if problem.kind == "value_error":
        return str(problem.context.get("error", problem.message))
    return problem.message.replace("Input should", "must", 1)


def _unknown_key(root: type[Config], path: tuple[str, ...], problem: _Problem) -> str:
    """`unknown key; given 4; did you mean 'n_heads'? (allowed: ...)`."""
    key = path[-1]
    _, _, allowed = problem.message.rpartition(" (allowed: ")
    siblings = allowed.rstrip(")").split(", ")
    close = [format_path((*path[:-1], name)) for name in _alike(key, siblings, 0.8)]
    if not close:
        by_leaf: dict[str, list[str]] = {}
        for name in dict.fromkeys(dotted_names(root)):
            by_leaf.setdefault(name.rsplit(".", 1)[-1], []).append(name)
        close = by_leaf.get(key, []) or by_leaf.get(_SYNONYMS.get(key, ""), [])
        close = close or [format_path((*path[:-1], name)) for name in _alike(key, siblings, 0.65)]
        if not close and (near := difflib.get_close_matches(key, by_leaf, n=1, cutoff=0.75)):
            close = by_leaf[near[0]]
        close = sorted(close, key=len)[:3]
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown key; given {show(problem.given)}{hint} (allowed: {', '.join(siblings)})"


def _alike(key: str, names: list[str], cutoff: float) -> list[str]:
    """Names among siblings that a user may have meant: a common synonym, near in spelling, or the initials."""
    if _SYNONYMS.get(key) in names:
        return [_SYNONYMS[key]]
    near = difflib.get_close_matches(key, names, n=1, cutoff=cutoff)
    return near or [name for name in names if _initials(key) == name or _initials(name) == key]


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def show(value: Any, limit: int = 60) -> str:
    """A value as a user would recognise it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
