"""What may import what, how long it takes, and what it pulls in."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("llm", "kernels", "vision", "evals", "launch")

_BASE = {"kernels", "llm.core", "llm.config"}
_MODELS = _BASE | {"llm.blocks", "llm.models"}
_LLM = _MODELS | {"llm", "llm.data", "llm.parallel", "llm.generate", "llm.checkpoint", "llm.train"}
_SERVE = _MODELS | {"llm.data", "llm.generate"}

ALLOWED = {
    "kernels": set(),
    "llm": set(),
    "llm.core": {"kernels"},
    "llm.config": {"llm.core"},
    "llm.blocks": _BASE,
    "llm.models": _BASE | {"llm.blocks"},
    "llm.data": {"llm.core", "llm.config"},
    "llm.parallel": _MODELS,
    "llm.checkpoint": _MODELS | {"llm.data", "llm.parallel"},
    "llm.generate": _MODELS | {"llm.data", "llm.parallel", "llm.checkpoint"},
    "llm.serve": _SERVE,
    "llm.train": _LLM,
    "llm.hf": _MODELS | {"llm.checkpoint"},
    "vision": _LLM,
    "evals": _LLM | {"llm.serve"},
    "launch": _LLM | {"llm.serve", "vision", "evals"},
}
"""Package -> what it may import besides itself. Every file belongs to the longest name that fits."""

OPTIONAL = (
    "accelerate",
    "datasets",
    "deepspeed",
    "flash_attn",
    "httpx2",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "megatron",
    "openai",
    "pandas",
    "prometheus_client",
    "pyarrow",
    "scipy",
    "selenium",
    "sentencepiece",
    "sklearn",
    "starlette",
    "tensorboard",
    "timm",
    "torchao",
    "torchvision",
    "transformers",
    "triton",
    "uvicorn",
    "wandb",
    "zstandard",
)


def layer(module: str) -> str | None:
    """The layer that a module of ours belongs to, None for foreign ones."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    if parts[0] != "llm" or len(parts) == 1:
        return parts[0]
    return ".".join(parts[:2])


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions and by importlib with a constant name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for name in node.names:
                yield node.lineno, f"{base}.{name.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__") and isinstance(
                node.args[0].value, str
            ):
                yield node.lineno, node.args[0].value


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Upward imports of one file."""
    own = layer(module)
    assert own is not None
    if own not in ALLOWED:
        return [f"{module}: the package {own} has no place in the import order; add it to ALLOWED"]
    found = []
    for line, target in imports(ast.parse(source), module if is_package else module.rpartition(".")[0]):
        wanted = layer(target)
        if wanted is not None and wanted != own and wanted not in ALLOWED[own]:
            found.append(f"{module}:{line}: {own} may not import {target}")
    return found


def our_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_go_one_way() -> None:
    files = our_files()
    assert len(files) > 10
    found = [
        line
        for path in files
        for line in violations(module_name(path), path.read_text(), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llm.core.state", "import llm.blocks.base"),
        ("llm.core.state", "from llm import blocks"),
        ("llm.blocks.mixers.x", "def f():\n    from llm.models import decoder"),
        ("llm.data.loader", "from llm.models.config import ModelConfig"),
        ("llm.blocks.norms", "from ..train import trainer"),
        ("kernels.rms", "from llm.core.errors import UserError"),
        ("vision.encoder", "import importlib\nimportlib.import_module('launch.train')"),
        ("llm.novelty.x", "pass"),
    ],
)
def test_an_upward_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llm.train.trainer", "from llm.checkpoint import x\nimport torch"),
        ("llm.blocks.mixers.x", "from . import y\nfrom ..base import BuildCtx\nfrom kernels import dispatch"),
        ("launch.train", "import llm.train.trainer, evals.perplexity"),
    ],
)
def test_a_downward_import_is_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_launch_files_shadow_no_module() -> None:
    """`python launch/x.py` puts launch/ first on sys.path; each file must take it away before it imports anything."""
    taken = set(sys.stdlib_module_names) | {"llm", "kernels", "vision", "evals", "tests"}
    for path in sorted((ROOT / "launch").glob("*.py")):
        if path.stem.startswith("__"):
            continue
        assert path.stem not in taken, f"launch/{path.stem} shadows the module {path.stem}"
        if path.stem.startswith("_"):
            continue
        shown = run_python(
            f"import runpy, sys; sys.path.insert(0, {str(path.parent)!r}); sys.argv = ['x', '--help']\n"
            f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
            f"except SystemExit: pass\n"
            f"print('shadowing:', {str(path.parent)!r} in sys.path)"
        )
        assert "shadowing: False" in shown, f"launch/{path.name} leaves launch/ on sys.path"


def run_python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_llm_is_quick_and_light() -> None:
    """Processor time is measured, since the machine may be busy with other tests."""
    out = run_python(
        "import sys, time\nimport llm\nseconds = time.process_time()\n"
        f"print(seconds, *[m for m in {OPTIONAL!r} if m in sys.modules])"
    )
    seconds, *heavy = out.split()
    assert float(seconds) < 3.0
    assert heavy == []


def test_minimal_dependencies() -> None:
    """The main path imports where no optional package can be imported."""
    code = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import importlib, pkgutil
import llm
for module in pkgutil.walk_packages(llm.__path__, "llm."):
    if module.name != "llm.hf" and not module.name.endswith("_manyformer"):  # these are for transformers
        importlib.import_module(module.name)
import llm.train, llm.models, llm.data, llm.generate, llm.checkpoint, launch.cli
print("done")
"""
    assert run_python(code).strip() == "done"


def test_kernels_beside_transformers() -> None:
    """transformers takes any package `kernels` with a version in its range for Hugging Face's."""
    pytest.importorskip("transformers")
    out = run_python(
        "import kernels\nassert not hasattr(kernels, '__version__')\n"
        "import transformers.models.llama.modeling_llama\nimport sys\n"
        "assert sys.modules['kernels'] is kernels\nprint(kernels.OWNER)"
    )
    assert out.strip().endswith("manyformer")


def test_version_is_outside_the_range_of_the_other_kernels_package() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tuple(map(int, version.split(".")))[:2] not in [(0, 16), (0, 17), (0, 18), (0, 19)]
