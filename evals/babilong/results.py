"""The folder of results: one line per sample, to which a restart adds what is missing, and what they sum up to."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.babilong.metric import chance
from evals.records import append_lines, whole_lines, wilson_interval
from llm.core.errors import UserError

CONDITIONS, SAMPLES = "conditions.json", "samples.jsonl"
N_DEPTHS = 5
HEADLINE = ("qa1", "qa2", "qa3", "qa4", "qa5")

Row = dict[str, Any]
Key = tuple[str, int, int, int]
"""(task, length, window, index)"""


def key_of(row: Row) -> Key:
    """What tells one sample from another."""
    return row["task"], row["length"], row["window"], row["index"]


@dataclass
class Folder:
    """Results of one model under one set of conditions."""

    path: Path
    conditions: dict[str, Any]
    rows: dict[Key, Row] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, conditions: dict[str, Any]) -> Folder:
        """Make a folder, or go on with one; a line that a kill left incomplete is dropped. UserError when it holds
        results of other conditions."""
        conditions = json.loads(json.dumps(conditions))
        folder = Folder(path, conditions)
        known = path / CONDITIONS
        try:
            path.mkdir(parents=True, exist_ok=True)
            if known.is_file():
                folder._compare(json.loads(known.read_text(encoding="utf-8")))
            elif (path / SAMPLES).exists():
                raise UserError(f"{path} holds {SAMPLES} without {CONDITIONS}; give another folder with out=")
            temporary = known.with_suffix(".new")
            temporary.write_text(json.dumps(folder.conditions, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, known)
            folder._read()
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot use the folder of results {path}: {error}; give another one with out=") from error
        return folder

    def _compare(self, known: dict[str, Any]) -> None:
        """What is None is not known yet, as the background where only the facts alone were asked for."""
        for name in [*known, *self.conditions]:
            old, new = known.get(name), self.conditions.get(name)
            if old is None or new is None:
                self.conditions[name] = new if old is None else old
            elif old != new:
                raise UserError(
                    f"{self.path} holds results of other conditions: {name} was {_short(old)} and is now "
                    f"{_short(new)}; give another folder with out=, or remove that one"
                )

    def _read(self) -> None:
        file = self.path / SAMPLES
        if file.exists():
            self.rows = {key_of(row): row for row in whole_lines(file)}

    def add(self, rows: Iterable[Row]) -> None:
        """Append results."""
        rows = list(rows)
        append_lines(self.path / SAMPLES, rows)
        self.rows.update((key_of(row), row) for row in rows)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def cell(rows: list[Row], metric: str) -> dict[str, Any]:
    """n, right and share of rows, with its 95% interval."""
    n, right = len(rows), sum(bool(row[metric]) for row in rows)
    low, high = wilson_interval(right, n)
    return {"n": n, "right": right, "share": right / n, "low": low, "high": high}


def summarise(folder: Folder) -> dict[str, Any]:
    """Shares by task and length under both metrics, their mean over qa1 to qa5, and by depth of the first supporting
    fact for tasks with one."""
    rows = list(folder.rows.values())
    tasks = sorted({row["task"] for row in rows}, key=lambda name: int(name[2:]))
    lengths = sorted({row["length"] for row in rows})
    cells: dict[str, Any] = {}
    means: dict[str, Any] = {}
    for metric in ("right", "right_fixed"):
        by = {
            (task, length): [row for row in rows if row["task"] == task and row["length"] == length]
            for task in tasks
            for length in lengths
        }
        found = {key: cell(own, metric) for key, own in by.items() if own}
        cells[metric] = {task: {str(n): found[task, n] for n in lengths if (task, n) in found} for task in tasks}
        means[metric] = {
            str(n): _mean([found[task, n] for task in HEADLINE])
            for n in lengths
            if all((task, n) in found for task in HEADLINE)
        }
    return {
        "tool": "babilong",
        "conditions": folder.conditions,
        "tasks": tasks,
        "lengths": lengths,
        "cells": cells,
        "mean_qa1_5": means,
        "chance": {task: chance(task) for task in tasks},
        "depths": {task: _by_depth([row for row in rows if row["task"] == task]) for task in tasks},
        "tokens": {str(n): _tokens([row for row in rows if row["length"] == n]) for n in lengths},
        "n_samples": len(rows),
    }


def _mean(cells: list[dict[str, Any]]) -> dict[str, Any]:
    share = statistics.fmean(c["share"] for c in cells)
    half = 1.96 * math.sqrt(sum(c["share"] * (1 - c["share"]) / c["n"] for c in cells)) / len(cells)
    return {"share": share, "low": max(0.0, share - half), "high": min(1.0, share + half)}


def _by_depth(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """length -> fifth of the context -> cell of the fixed metric, for tasks whose answer follows from one fact."""
    found: dict[str, dict[str, Any]] = {}
    for length in sorted({row["length"] for row in rows}):
        own = [row for row in rows if row["length"] == length]
        if length == 0 or any(len(row["depths"]) != 1 for row in own):
            continue
        fifths = [[r for r in own if min(N_DEPTHS - 1, int(N_DEPTHS * r["depths"][0])) == i] for i in range(N_DEPTHS)]
        found[str(length)] = {str(i): cell(part, "right_fixed") for i, part in enumerate(fifths) if part}
    return found


def _tokens(rows: list[Row]) -> dict[str, float]:
    """Mean tokens and bytes of the contexts, and tokens of all that was read."""
    return {key: round(statistics.fmean(row[key] for row in rows), 1) for key in ("n_context", "n_bytes", "n_read")}
