"""Results of single samples as JSON lines: written as they come, found again after a kill, under fixed conditions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm.core.errors import UserError

Record = dict[str, Any]


def whole_lines(path: Path) -> list[Any]:
    """The objects of a file of JSON lines, from which a line that a kill left unfinished is cut off. ValueError when a
    whole line is no JSON."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return found


def append_lines(path: Path, rows: Iterable[Record]) -> None:
    """Write objects behind those of a file of JSON lines; they are in the file when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


class Records:
    """The file of one evaluation: its first line holds the conditions, each other line one sample with a unique `id`.

    Opening a file of an earlier call gives back its samples; a line that a kill left unfinished is cut off. UserError
    when the file belongs to other conditions, naming the first that differs, or is no file of results.
    """

    def __init__(self, path: str | Path, conditions: Record) -> None:
        self.path = Path(path)
        self.done: dict[str, Record] = {}
        wanted = json.loads(json.dumps(conditions))
        try:
            if self.path.exists() and self._read(wanted):
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"conditions": wanted}) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write the results to {self.path}: {error.strerror or error}") from error

    def _read(self, wanted: Record) -> bool:
        """Take over the whole lines; False when there is not even a first one."""
        try:
            lines = whole_lines(self.path)
            if not lines:
                return False
            first, *rows = lines
            known = first["conditions"]
            self.done = {row["id"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no file of results; move it away or name another place") from error
        for name in [*known, *wanted]:
            if known.get(name) != wanted.get(name):
                raise UserError(
                    f"{self.path} holds results of other conditions: {name} was {known.get(name)!r}, now it is "
                    f"{wanted.get(name)!r}; remove the file or name another place with out="
                )
        return True

    def add(self, rows: Iterable[Record]) -> None:
        """Append samples, each with a new `id`; they are in the file when this returns."""
        rows = list(rows)
        assert not {row["id"] for row in rows} & self.done.keys(), "a sample was done twice"
        append_lines(self.path, rows)
        self.done |= {row["id"]: row for row in rows}


def wilson_interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share of `right` in n samples, 95 % by default (Wilson 1927). With fractional scores it is a little
    too wide, since their variance is at most that of a yes or no with the same mean."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
