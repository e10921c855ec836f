"""The source files that an exported model needs, as modules of one folder with relative imports.

transformers loads the code of a model from the folder that holds its weights, and follows relative imports within that
folder only. So `llm.blocks.norms` becomes `llm_blocks_norms.py`, and its imports are rewritten. What is taken along is
found by walking the imports from the model's classes and the classes of its config; nothing is written by hand that
could differ from the code that is run here. Packages that find their modules by looking into a folder import, in an
export, those that the config names.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llm.models.wrappers  # noqa: F401  (what a config names is registered)
from llm.config.base import Config
from llm.core.errors import UserError
from llm.models.config import ModelConfig

OURS = ("llm", "kernels")
REMOTE = "llm.checkpoint.hf.remote"
ENTRIES = ("modeling_manyformer", "configuration_manyformer")
REPLACED = dict.fromkeys(("pydantic", "pydantic_core", "llm.config.base", "llm.config.load"), f"{REMOTE}.plain_config")
"""Module -> what stands for it in an export."""
FILLED = ("llm.blocks", "llm.models.wrappers")
"""Packages that import what they find in their folders; in an export they import what the config names."""
LEFT_OUT = ("llm.models.zoo",)
"""Modules that are reached only by keys that an exported config does not have."""
INSTALLED = ("torch", "transformers", "safetensors", "numpy")
"""What may be imported besides the standard library; other packages are optional."""
LOADER = 'importlib.import_module(f"kernels.{name}")'
HEADER = """# Part of Manyformer. SPDX-License-Identifier: Apache-2.0
# Written by its export from {module}; changes are lost with the next export.
"""


def bundle(config: ModelConfig) -> dict[str, str]:
    """File name -> source text of all that a model of this config needs; UserError for blocks of other packages."""
    parts = _modules_of(config)
    texts: dict[str, str] = {}
    waiting = [f"{REMOTE}.{name}" for name in ENTRIES]
    while waiting:
        module = waiting.pop()
        if module in texts:
            continue
        if module in FILLED:
            named = [part for part in parts if part.startswith(f"{module}.")]
            texts[module] = f'"""The parts that this model is made of."""\n\n{_imports_of(named)}'
            waiting += named
            continue
        texts[module], needed = _rewritten(module)
        waiting += needed
    files = {f"{flat(module)}.py": HEADER.format(module=module) + text for module, text in sorted(texts.items())}
    # transformers finds files by `from .x import`, from the main one; that spelling stands here for all of them.
    needed_files = "\n".join(f"    from .{name[:-3]} import __name__" for name in files if name[:-3] not in ENTRIES)
    for entry in ENTRIES[:1]:
        files[f"{entry}.py"] += f"\nif TYPE_CHECKING:\n    # All files of this model.\n{needed_files}\n"
    return files


def write_bundle(config: ModelConfig, folder: str | Path) -> None:
    """Write the files of `bundle` into a folder."""
    for name, text in bundle(config).items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def flat(module: str) -> str:
    """The name of a module of ours within an export."""
    return module.removeprefix(f"{REMOTE}.").replace(".", "_")


def _modules_of(config: ModelConfig) -> list[str]:
    """Modules of all classes in a config."""
    found: dict[str, None] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Config):
            module = type(value).__module__
            if module.split(".")[0] not in OURS:
                raise UserError(
                    f"cannot export: {type(value).__name__} comes from {module}; only blocks of this project go along"
                )
            found[module] = None
            for name in type(value).model_fields:
                walk(getattr(value, name))
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    walk(config)
    return sorted(found)


def _imports_of(modules: list[str]) -> str:
    return "".join(f"from . import {flat(module)}  # noqa: F401\n" for module in modules)


def _source(module: str) -> tuple[str, bool]:
    """(text, whether it is a package) of a module of ours."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8"), spec.submodule_search_locations is not None


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _rewritten(module: str) -> tuple[str, list[str]]:
    """(text with relative imports, modules of ours that it needs) of a module."""
    text, is_package = _source(module)
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    needed: list[str] = []
    for node in sorted(_import_nodes(tree), key=lambda node: -node.lineno):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}:{node.lineno}: a relative import"
        new = _statement(module, node, needed)
        if new is None:
            continue
        assert node.end_lineno is not None
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in new]
    text = "".join(lines)
    if '"manyformer::' in text or "torch.ops.manyformer." in text:
        # Operators live in one table for the process: those of two folders, or of an installed Manyformer, must differ.
        text = text.replace('"manyformer::', '_OPERATORS + "::').replace(
            "torch.ops.manyformer.", "getattr(torch.ops, _OPERATORS)."
        )
        start = "from __future__ import annotations\n"
        assert text.count(start) == 1, module
        text = text.replace(start, f"{start}\nimport zlib\n\n{_OPERATORS}\n")
    if module == "kernels.dispatch":
        assert LOADER in text, f"{module} loads its folders in another way than the export knows"
        text = text.replace(LOADER, 'importlib.import_module(f".kernels_{name}", __package__)')
    if module == f"{REMOTE}.{ENTRIES[0]}":
        text = text.replace("from typing import Any, ClassVar\n", "from typing import TYPE_CHECKING, Any, ClassVar\n")
        assert "TYPE_CHECKING" in text
    bound = {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if "." in a.name
    }
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not bound & used & set(OURS), f"{module} uses a module of ours by its full name"
    return text, needed


_OPERATORS = '_OPERATORS = f"manyformer_{zlib.crc32(__name__.encode()):08x}"'


def _import_nodes(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _statement(module: str, node: ast.Import | ast.ImportFrom, needed: list[str]) -> list[str] | None:
    """The lines in the place of an import; None: as it is. What it needs is added to `needed`."""
    if isinstance(node, ast.ImportFrom):
        return _from_statement(module, node, needed)
    new: list[str] = []
    for alias in node.names:
        if _kind(alias.name) == "ours":
            name = REPLACED.get(alias.name, alias.name)
            needed.append(name)
            new.append(f"from . import {flat(name)}{f' as {alias.asname}' if alias.asname else ''}  # noqa: F401")
        else:
            new += _guarded(f"import {ast.unparse(alias)}", alias.name)
    return new


def _from_statement(module: str, node: ast.ImportFrom, needed: list[str]) -> list[str] | None:
    assert node.module is not None
    base = REPLACED.get(node.module, node.module)
    if node.module.startswith(LEFT_OUT):
        return [f'raise ImportError("{node.module} is part of Manyformer, not of an export")']
    if _kind(base) != "ours":
        return _guarded(ast.unparse(node), base) if _kind(base) == "optional" else None
    new: list[str] = []
    names: list[str] = []
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        if node.module not in REPLACED and _is_module(base) and _is_package(base) and _is_module(inner):
            needed.append(inner)
            new.append(f"from . import {flat(inner)} as {alias.asname or alias.name}  # noqa: F401")
        else:
            names.append(ast.unparse(alias))
    if names:
        needed.append(base)
        new.append(f"from .{flat(base)} import {', '.join(names)}")
    return new


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _guarded(statement: str, module: str) -> list[str]:
    """An import of an optional package so that transformers does not ask for it before it is needed."""
    if _kind(module) == "installed":
        return [statement]
    return ["try:", f"    {statement}", "except ImportError:", "    raise"]


def _kind(module: str) -> str:
    top = module.split(".")[0]
    if top in OURS or module in REPLACED:
        return "ours"
    return "installed" if top in INSTALLED or top in sys.stdlib_module_names else "optional"
