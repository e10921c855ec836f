"""How a command of `evals` ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from llm.core.errors import UserError


def run_command(main: Callable[[list[str]], int], name: str) -> NoReturn:
    """Exit with the code of main(arguments); a mistake of the user is one line on stderr, and code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
