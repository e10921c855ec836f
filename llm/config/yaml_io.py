"""YAML as configs use it: closed against repeated keys, 1e-3 is a number, and only true and false are booleans."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llm.core.errors import UserError

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^(?:[-+]?0x[0-9a-fA-F]+|[-+]?(?:0|[1-9][0-9_]*))$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_MERGE = re.compile(r"^<<$")


class _Loader(yaml.SafeLoader):
    """Reads plain data only. Dates, octal and sexagesimal numbers stay strings."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that this module or any YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", _MERGE, ["<"])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(source: Path | str, *, name: str = "") -> Any:
    """The data of a YAML file (a Path: must be a mapping, empty counts as one) or of a text (any value).

    name: what a text is called in messages. Raises UserError with the line of the mistake.
    """
    name = name or str(source)
    try:
        text = source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source
        data = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start}); a config is a YAML file") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark and isinstance(source, Path) else ""
        raise UserError(f"{name}:{where} not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    if _contains_itself(data, ()):
        raise UserError(f"{name}: not a valid config: an anchor contains itself")
    if not isinstance(source, Path):
        return data
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{name}: a config is a mapping (lines of `key: value`); this file holds a {_kind(data)}")
    return data


def dump_yaml(tree: dict[str, Any]) -> str:
    """YAML text of plain data, keys in their given order; `read_yaml` gives the same data back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _contains_itself(data: Any, above: tuple[int, ...]) -> bool:
    if not isinstance(data, (dict, list)):
        return False
    below = data.values() if isinstance(data, dict) else data
    return id(data) in above or any(_contains_itself(item, (*above, id(data))) for item in below)


def _kind(data: Any) -> str:
    return "list" if isinstance(data, list) else f"single value, {data!r:.40}"
