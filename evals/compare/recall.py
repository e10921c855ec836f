"""Associative recall of a candidate's block: it is trained on key-value pairs and asked for every value."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from evals.compare.config import CompareConfig, RecallConfig
from evals.compare.solve import Matched, at_width
from evals.synthetic.mqar import MQAR
from evals.synthetic.presets import PREVIOUS_TOKEN
from evals.synthetic.run import measure
from evals.synthetic.train import TrainSettings, model_for
from llm.config.load import config_hash, validate
from llm.models.config import ModelConfig


def recall_model(model: ModelConfig, settings: RecallConfig) -> ModelConfig | None:
    """One block of a candidate behind a layer over two tokens, at settings.d_model and without positions; None where
    that is another model: wrappers, or a block that does not exist at that width."""
    if model.wrappers:
        return None
    wide = at_width(model, settings.d_model)
    if wide is None:
        return None
    block = wide.to_dict()["layers"][0]["pattern"][0]
    tree = wide.to_dict() | {"layers": [{"pattern": [PREVIOUS_TOKEN, block]}], "position": "none"}
    return model_for(validate(ModelConfig, tree), _task(settings), _training(settings))


def recall(model: ModelConfig, settings: RecallConfig, name: str) -> dict[str, Any]:
    """{"accuracy": of all questions, "by_pairs": {pairs: accuracy}, "steps", "state_bytes", "chance"} of one model."""
    torch.set_num_threads(1)
    row = measure(_task(settings), model, _training(settings), seeds=settings.seeds, lrs=settings.lrs, name=name)
    return {
        "accuracy": row["accuracy"]["each"],
        "by_pairs": {str(n): row["by_group"].get(str(n)) for n in settings.n_pairs},
        "steps": row["steps"],
        "lr": row["lr"],
        "tried": row["tried"],
        "state_bytes": row["state_bytes"],
        "chance": _task(settings).chance(),
    }


def recall_all(
    config: CompareConfig, candidates: list[Matched], log: Callable[[str], None], *, train: bool
) -> dict[str, dict[str, Any]]:
    """By candidate, trained `jobs` at a time and kept in files, so that a rerun trains none again; train False: those
    that are there."""
    settings = config.recall
    if settings is None:
        return {}
    models = {found.name: recall_model(found.model, settings) for found in candidates}
    folder = Path(config.runs_dir) / config.name / "recall"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        name: folder / f"{name}-{config_hash(model)}-{config_hash(settings)}.json"
        for name, model in models.items()
        if model is not None
    }
    pool = ProcessPoolExecutor(config.jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = {
            name: pool.submit(recall, models[name], settings, name)  # type: ignore[arg-type]
            for name, path in paths.items()
            if train and not path.exists()
        }
        for name, future in waiting.items():
            log(f"recall of {name}")
            paths[name].write_text(json.dumps(future.result()), encoding="utf-8")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def _task(settings: RecallConfig) -> MQAR:
    return MQAR(length=settings.length, n_pairs=settings.n_pairs, vocab_size=settings.vocab_size)


def _training(settings: RecallConfig) -> TrainSettings:
    return TrainSettings(
        steps=settings.steps,
        optimizer="muon",
        lr=settings.lrs[0],
        adam_lr=3e-3,
        stop_at=settings.stop_at,
        eval_examples=settings.eval_examples,
    )
