"""The shell around every command: help, exit codes, and mistakes of the user as one line instead of a traceback.

Exit codes: 0 done, 1 a fault of the program, 2 a mistake in arguments, config or input, 75 stopped on request after
saving (a scheduler may start it again), 130 interrupted.

A file of this folder may be run as a script, and then Python puts this folder on `sys.path` instead of the checkout.
Each one therefore begins, after its docstring and `from __future__`, with

    import sys
    from pathlib import Path

    if __name__ == "__main__":
        sys.path[0] = str(Path(__file__).resolve().parent.parent)

so that no file here can stand for an installed module of its name, and ends with

    if __name__ == "__main__":
        run(main, prog="train", doc=__doc__)
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llm.core.compat import require_own_kernels
from llm.core.errors import UserError, nearest

EXIT_USAGE = 2
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130

Main = Callable[[list[str]], int | None]


class Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as UserError, with the nearest option, and leaves help to `run`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"add_help": False, "allow_abbrev": False} | settings)

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]!r}{self._hint(unknown[0])}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def _hint(self, given: str) -> str:
        close = nearest(given.split("=", 1)[0], self._option_string_actions)
        return f"; did you mean {close[0]}?" if close else ""


def run(main: Main, *, prog: str, doc: str | None, argv: Sequence[str] | None = None) -> NoReturn:
    """Call `main(arguments)` and end the process with its exit code (None is 0).

    prog: the command's name, such as "train". doc: the text that --help prints. argv: default `sys.argv[1:]`.
    With MANYFORMER_DEBUG=1 the mistakes of a user show their traceback as well.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code = _guarded(main, prog, doc, arguments)
    sys.exit(code)


def _guarded(main: Main, prog: str, doc: str | None, arguments: list[str]) -> int:
    try:
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        code: int | None = None
        if "--help" in options or "-h" in options:
            print((doc or prog).strip())
        else:
            _check_encoding(arguments)
            require_own_kernels()
            code = main(arguments)
        sys.stdout.flush()
        return code or 0
    except UserError as error:
        if os.environ.get("MANYFORMER_DEBUG") == "1":
            traceback.print_exc()
        print(f"{_name(prog)}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"{_name(prog)}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone. Point stdout elsewhere, or the flush at exit raises again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _check_encoding(arguments: list[str]) -> None:
    for index, argument in enumerate(arguments, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:
            shown = argument.encode("utf-8", "surrogateescape")
            raise UserError(f"argument {index} is not valid UTF-8: {shown!r}; give it in UTF-8 or in a file") from error


def _name(prog: str) -> str:
    """`manyformer train`, with the rank when another process speaks for the same command."""
    name = prog if prog.startswith("manyformer") else f"manyformer {prog}"
    rank = os.environ.get("RANK", "0")
    return name if rank == "0" else f"{name} [rank {rank}]"
