"""Several models put to the same samples: one table, gone on with where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.babilong import train
from evals.babilong.study import Study, run, table
from llm.config.load import dump_config, load_config
from llm.core.errors import UserError
from tests.unit.babilong.test_train import CONFIGS, books, config_for

__all__ = ["books"]


def test_a_study_trains_all_and_compares_them(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = config_for(books, tmp_path / "runs")
    base = base.replace(stages=[{"length": 64, "steps": 1}])
    wrapper = {"wrappers": [{"type": "rmt", "segment": 64, "n_memory": 4}]}
    for name, model in (("plain", {}), ("rmt", wrapper)):
        dump_config(base.replace(name=name, model=base.model.to_dict() | model), tmp_path / f"{name}.yaml")
    cells = [{"lengths": [0, 64], "samples": 3}, {"lengths": [192], "samples": 2, "without": ["plain"]}]
    study = Study.model_validate({"models": ["plain.yaml", "rmt.yaml"], "cells": cells, "out": str(tmp_path / "out")})
    first = run(study, tmp_path)
    monkeypatch.setattr(train, "fit", None)
    assert run(study, tmp_path) == first == json.loads((tmp_path / "out" / "table.json").read_text())
    by_name = {model["name"]: model["cells"] for model in first["models"]}
    assert {n: cell["n"] for n, cell in by_name["plain"].items()} == {"0": 3, "64": 3}
    assert {n: cell["n"] for n, cell in by_name["rmt"].items()} == {"0": 3, "64": 3, "192": 2}
    asked = [
        [json.loads(line)["id"] for line in (tmp_path / "runs" / name / "babilong" / "samples.jsonl").open()][:6]
        for name in by_name
    ]
    assert asked[0] == asked[1]
    lines = table(first).splitlines()
    assert lines[0].endswith("| 0k | 64 | 192 |") and lines[2].endswith("| - |")
    assert run(study.replace(models=["rmt.yaml"]), tmp_path) == first, "the other keeps its row"
    with pytest.raises(UserError, match="no cells are left to it"):
        run(study.replace(cells=cells[1:]), tmp_path)
    dump_config(base.replace(name="other", task="qa2"), tmp_path / "other.yaml")
    with pytest.raises(UserError, match="holds a study of qa1; give another folder"):
        run(study.replace(models=["other.yaml"]), tmp_path)
    with pytest.raises(UserError, match=r"no config .*absent\.yaml"):
        run(study.replace(models=["absent.yaml"]), tmp_path)


def test_the_study_names_all_configs_beside_it() -> None:
    study = load_config(Study, [str(CONFIGS[0].parent / "study-qa1.yaml")])
    assert sorted(study.models) == [path.name for path in CONFIGS if path.stem != "study-qa1"]
    names = {load_config(train.BabilongTraining, [str(CONFIGS[0].parent / name)]).name for name in study.models}
    assert {name for cells in study.cells for name in cells.without} <= names
