"""The `manyformer` program: `manyformer COMMAND ...` runs launch/COMMAND.py, which is imported only then."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch._cli import run
from llm.core.errors import UserError, nearest

_SUMMARIES = {
    "prepare": "turn text, JSONL, Parquet or a data set into token shards",
    "train": "train a model from a config; several processes with torchrun",
    "generate": "continue a prompt with a trained model",
    "serve": "answer requests over HTTP as OpenAI's interface, with a page to try prompts",
    "evaluate": "perplexity and bits per byte of a trained model on any text",
    "grow": "give a trained model more parameter tokens, its outputs unchanged",
    "export": "write a trained model for Hugging Face transformers, and read one",
    "estimate": "parameters, FLOPs, state and memory of a config, without hardware",
    "bench": "measure speed, one JSON line each",
    "compare": "train and measure several architectures, one table and plots",
}


def commands() -> dict[str, str]:
    """The commands that this installation has, each with one line on what it does."""
    folder = Path(__file__).resolve().parent
    return {name: text for name, text in _SUMMARIES.items() if (folder / f"{name}.py").is_file()}


def usage() -> str:
    """The text of `manyformer --help`."""
    lines = [f"  {name:<10} {text}" for name, text in commands().items()]
    return "\n".join(
        [
            "usage: manyformer COMMAND [CONFIG.yaml] [key=value ...]",
            "",
            "commands:",
            *lines,
            "",
            "manyformer COMMAND --help explains a command; manyformer --version prints the version.",
        ]
    )


def version() -> str:
    """The version of the installed distribution; of a source tree without an installation, `source tree`."""
    try:
        return importlib.metadata.version("manyformer")
    except importlib.metadata.PackageNotFoundError:
        return "(source tree, not installed)"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Dispatch to a command; the process ends with that command's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        run(lambda _: print(usage()), prog="manyformer", doc=usage(), argv=[])
    name, rest = arguments[0], arguments[1:]
    if name in ("-V", "--version"):
        run(lambda _: print(f"manyformer {version()}"), prog="manyformer", doc=usage(), argv=[])
    if name not in commands():
        run(lambda _: _unknown(name), prog="manyformer", doc=usage(), argv=[])
    module = importlib.import_module(f"launch.{name}")
    run(module.main, prog=name, doc=module.__doc__, argv=rest)


def _unknown(name: str) -> None:
    close = nearest(name, commands())
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown command {name!r}{hint} (allowed: {', '.join(commands())})")


if __name__ == "__main__":
    main()
