"""usage: python -m evals.babilong.study STUDY.yaml [key=value ...]

Train several models on one task of BABILong and put all of them to the same samples of each length: one table and one
heat map. Killed, the same command goes on where it was; models that are not named this time keep their rows.

  python -m evals.babilong.study configs/babilong/study-qa1.yaml
  python -m evals.babilong.study configs/babilong/study-qa1.yaml models=[armt-qa1.yaml]

keys:
  models=[]     configs of evals.babilong.train, beside the study's file; each trained as that command trains it
  cells=[]      {lengths, samples, without}: so many samples of each length, for all but the models named in `without`
  batch=8       samples read together
  chunk=1024    tokens read at once
  runs_dir=     where the runs lie (default: as each config has it)
  out=          folder of table.md, table.json and heatmap.png
  num_threads=1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from evals.babilong import run as evaluation
from evals.babilong import train
from evals.babilong.options import BabilongOptions
from evals.babilong.report import short
from evals.command import run_command
from evals.heatmap import heat_map
from llm.config.base import Config, Count
from llm.config.load import load_config
from llm.core.errors import UserError

TABLE = "table.json"


class Cells(Config):
    """lengths: in tokens, 0 for the facts alone. samples: of each. without: names of models that are left out."""

    lengths: list[Count] = Field(min_length=1)
    samples: Count = Field(ge=1)
    without: list[str] = []


class Study(Config):
    """See the command's help."""

    models: list[str] = Field(min_length=1)
    cells: list[Cells] = Field(min_length=1)
    batch: int = Field(8, ge=1)
    chunk: Count = Field(1024, ge=1)
    runs_dir: str | None = None
    out: str
    num_threads: int = Field(1, ge=1)


def run(study: Study, folder: Path) -> dict[str, Any]:
    """Train and evaluate all; {"task", "models": [{name, parameters, stages, cells}]}. folder: of the configs.
    UserError where a model has no cells, or `out` holds a study of another task."""
    configs = [_config(study, folder / name) for name in study.models]
    task = configs[0].task
    for config in configs:
        if config.task != task or all(config.name in cells.without for cells in study.cells):
            raise UserError(
                f"{config.name} is of task {config.task} and the study of {task}, or no cells are left to it"
            )
    found = _earlier(study, task)
    for config in configs:
        record = train.run(config)
        summary: dict[str, Any] = {}
        for cells in study.cells:
            if config.name in cells.without:
                continue
            options = BabilongOptions(
                run=str(Path(config.runs_dir) / config.name), tasks=[config.task], lengths=cells.lengths,
                form="finetuned", samples=cells.samples, background=config.background, batch=study.batch,
                chunk=study.chunk, num_threads=study.num_threads,
            )  # fmt: skip
            summary = evaluation.run(options)
        scores = summary["cells"]["right"][config.task]
        found[config.name] = {
            "name": config.name,
            "parameters": record["parameters"],
            "stages": [{k: v for k, v in stage.items() if k != "history"} for stage in record["stages"]],
            "cells": {length: scores[length] for length in map(str, summary["lengths"]) if length in scores},
        }
        _write(study, {"task": task, "models": list(found.values())})
    return {"task": task, "models": list(found.values())}


def _earlier(study: Study, task: str) -> dict[str, dict[str, Any]]:
    """Rows of the table that is there, by name."""
    path = Path(study.out) / TABLE
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["task"] != task:
        raise UserError(f"{study.out} holds a study of {record['task']}; give another folder with out=")
    return {model["name"]: model for model in record["models"]}


def _config(study: Study, path: Path) -> train.BabilongTraining:
    if not path.is_file():
        raise UserError(f"no config {path}; models= takes names of files beside the study's")
    words = [str(path), f"num_threads={study.num_threads}"]
    return load_config(train.BabilongTraining, words + ([f"runs_dir={study.runs_dir}"] if study.runs_dir else []))


def table(record: dict[str, Any]) -> str:
    """Models by lengths in Markdown: percent right, in brackets the 95% interval and the number of samples."""
    lengths = sorted({int(n) for model in record["models"] for n in model["cells"]})
    head = ["model", "parameters", "steps", "CPU s", *(short(n) for n in lengths)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for model in record["models"]:
        steps = sum(stage["steps"] for stage in model["stages"])
        seconds = sum(stage["cpu_seconds"] for stage in model["stages"])
        cells = [_cell(model["cells"].get(str(n))) for n in lengths]
        row = [model["name"], f"{model['parameters']:,}", str(steps), f"{seconds:.0f}", *cells]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell['share']:.1f} ({100 * cell['low']:.0f}-{100 * cell['high']:.0f}, {cell['n']})"


def _write(study: Study, record: dict[str, Any]) -> None:
    out = Path(study.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table(record) + "\n", encoding="utf-8")
    (out / TABLE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lengths = sorted({int(n) for model in record["models"] for n in model["cells"]})
    shares = [[model["cells"].get(str(n), {}).get("share") for n in lengths] for model in record["models"]]
    title = f"{record['task']}: right answers, %, by tokens of the sample"
    heat_map(out / "heatmap.png", title, [short(n) for n in lengths], [m["name"] for m in record["models"]], shares)


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or {"-h", "--help"} & set(argv):
        print(str(__doc__).strip())
        return 0 if argv else 2
    study = load_config(Study, argv)
    print(table(run(study, Path(argv[0]).parent)))
    print(f"wrote {study.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main, "babilong.study")
