"""Nothing that loads a file can run code from it."""

from __future__ import annotations

import ast
import io
import pickletools
from pathlib import Path

import pytest
import yaml

from llm.config import yaml_io
from tests.unit.checkpoint.helpers import save_steps

MODULES = {"torch", "pickle", "yaml", "np", "numpy", "joblib", "dill", "cloudpickle"}
UNSAFE = {f"{module}.{call}" for module in MODULES for call in ("load", "loads", "unsafe_load", "load_all")}
SAFE_YAML = "llm/config/yaml_io.py"


def test_no_file_of_a_checkpoint_is_a_pickle_or_an_archive(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, config_yaml="name: x\n")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml", ""}
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80")), path
        with pytest.raises(Exception):  # noqa: B017  (whatever the disassembler says of a file that is no pickle)
            pickletools.dis(data, out=io.StringIO())


def test_loaders_in_the_code_are_safe(repo_root: Path) -> None:
    """torch.load only with weights_only=True, and no other loader that unpickles."""
    found = [
        f"{path.relative_to(repo_root)}:{node.lineno}: {name}"
        for package in ("llm", "vision", "evals", "launch", "kernels")
        for path in sorted((repo_root / package).rglob("*.py"))
        for node, name in _calls(ast.parse(path.read_text()))
        if not _safe(node, name) and (name, path) != ("yaml.load", repo_root / SAFE_YAML)
    ]
    assert found == []


def test_the_one_yaml_loader_is_a_safe_one() -> None:
    assert issubclass(yaml_io._Loader, (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@pytest.mark.parametrize(
    "code, safe",
    [
        ("torch.load(f)", False),
        ("torch.load(f, weights_only=False)", False),
        ("torch.load(f, weights_only=True)", True),
        ("pickle.loads(b)", False),
        ("np.load(f)", False),
        ("np.load(f, allow_pickle=False)", True),
        ("json.load(f)", True),
    ],
)
def test_the_check_itself(code: str, safe: bool) -> None:
    assert all(_safe(node, name) for node, name in _calls(ast.parse(code))) is safe


def _calls(tree: ast.AST) -> list[tuple[ast.Call, str]]:
    return [(node, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _safe(node: ast.Call, name: str) -> bool:
    if name not in UNSAFE:
        return True
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return given.get("weights_only") == "True" or (name.endswith("p.load") and given.get("allow_pickle") == "False")
