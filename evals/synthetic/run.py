"""What `python -m evals.synthetic` does: the config, one row per mixer, the table."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field

from evals.synthetic.base import TASKS, TaskConfig, TokenTask, VectorTask, accuracy, squared_error
from evals.synthetic.presets import SMALL
from evals.synthetic.train import Fitted, TrainSettings, fit, metric_name, model_for
from llm.blocks.base import MIXERS, MixerConfig
from llm.config.base import Config
from llm.config.load import apply_override, merge, resolve, validate
from llm.core.errors import UserError, unknown_name
from llm.models.config import ModelConfig
from llm.train.callbacks.environment import git_revision, versions
from llm.train.hardware import cpu_name, device_name

HEAD_WIDTH = 32
MODEL: dict[str, Any] = {
    "d_model": 64,
    "layers": [{"pattern": [{"mixer": "attention", "channel": {"type": "swiglu", "d_hidden": 128}}], "repeat": 2}],
    "init": {"std": None},
}


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class SyntheticConfig(Config):
    """The keys of the command. model: laid over MODEL; mixer: takes the place of every mixer in it that is
    a bare name; one with settings stays, as a layer that all models have."""

    task: TaskConfig
    mixer: Annotated[list[MixerConfig], BeforeValidator(_as_list)] = Field(min_length=1)
    model: dict[str, Any] = {}
    train: TrainSettings = TrainSettings()
    lrs: list[float] = []
    seeds: list[int] = Field([0], min_length=1)
    num_threads: int = Field(1, ge=1)

    def with_mixer(self, mixer: MixerConfig) -> ModelConfig:
        """The model with this mixer in every layer that is to have one."""
        tree = merge(copy.deepcopy(MODEL), copy.deepcopy(self.model))
        for group in tree["layers"]:
            for block in group["pattern"]:
                if isinstance(block.get("mixer"), str):
                    block["mixer"] = mixer.to_dict()
        return model_for(validate(ModelConfig, {"vocab_size": 2} | tree), self.task, self.train)


def load(argv: Sequence[str]) -> SyntheticConfig:
    """The config of command-line arguments: a task, then key=value."""
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        raise UserError(f"give a task first (allowed: {', '.join(TASKS.names())}); see --help")
    name, *rest = argv
    if name not in TASKS.names():
        raise UserError(unknown_name("task", name, TASKS.names()))
    tree: dict[str, Any] = {"task": {"type": name}, "mixer": "attention"}
    for index, word in enumerate(rest):
        key, _, value = word.partition("=")
        if word == "--preset" and index + 1 < len(rest):
            rest[index : index + 2] = [f"preset={rest[index + 1]}"]
            key, value = "preset", rest[index].partition("=")[2]
        if key == "preset":
            if value != "small":
                raise UserError(f"preset is {value!r} (allowed: small; without one, the setting of the paper)")
            tree = merge(tree, copy.deepcopy(SMALL[name]))
    for word in rest:
        if not word.startswith("preset="):
            if "=" not in word:
                raise UserError(f"{word!r} is no key=value; see --help")
            apply_override(tree, word)
    tree["mixer"] = [_with_heads(mixer, tree) for mixer in _as_list(tree["mixer"])]
    config = validate(SyntheticConfig, resolve(tree))
    for mixer in config.mixer:
        config.with_mixer(mixer).build("meta")
    return config


def _with_heads(mixer: Any, tree: dict[str, Any]) -> Any:
    """The mixer, with n_heads where it must have some and none are given."""
    given = {"type": mixer} if isinstance(mixer, str) else mixer
    if not isinstance(given, dict) or given.get("type") not in MIXERS.names() or "n_heads" in given:
        return mixer
    field = MIXERS.get(given["type"]).model_fields.get("n_heads")
    if field is None or not field.is_required():
        return mixer
    d_model = tree.get("model", {}).get("d_model", MODEL["d_model"])
    return {**given, "n_heads": max(1, d_model // HEAD_WIDTH)}


def run(config: SyntheticConfig) -> dict[str, Any]:
    """Train every mixer with every seed; the record that is printed as JSON."""
    torch.set_num_threads(config.num_threads)
    rows = [
        measure(config.task, config.with_mixer(mixer), config.train, lrs=config.lrs, seeds=config.seeds, name=label)
        for mixer, label in zip(config.mixer, labels(config.mixer), strict=True)
    ]
    return {
        "tool": "synthetic",
        "task": config.task.to_dict(),
        "model": merge(MODEL, config.model),
        "train": config.train.to_dict(),
        "seeds": config.seeds,
        "rows": rows,
        **references(config.task, config.train),
        "conditions": conditions(config.num_threads),
    }


def labels(mixers: Sequence[MixerConfig]) -> list[str]:
    """A short name for each mixer: its type, and what is not as by default where types repeat."""
    types = [mixer.type for mixer in mixers]
    found = []
    for mixer in mixers:
        fields = type(mixer).model_fields
        told = {k: v for k, v in mixer.to_dict().items() if k != "type" and v != fields[k].default}
        own = ", ".join(f"{k}={v}" for k, v in told.items())
        found.append(f"{mixer.type}({own})" if types.count(mixer.type) > 1 and own else mixer.type)
    return found


def measure(
    task: TaskConfig,
    model: ModelConfig,
    settings: TrainSettings,
    *,
    seeds: Sequence[int],
    lrs: Sequence[float] = (),
    name: str = "",
) -> dict[str, Any]:
    """One row: the model trained at each rate with each seed; that of the rate with the best mean is described."""
    best: tuple[float, float, list[Fitted]] | None = None
    sign = 1 if isinstance(task, TokenTask) else -1
    tried = {}
    for lr in lrs or [settings.lr]:
        fitted = [
            fit(task, model, settings.replace(lr=lr), seed, label=f"{name} lr {lr:g} seed {seed}") for seed in seeds
        ]
        mean = statistics.fmean(f.scores[metric_name(task)] for f in fitted)
        tried[f"{lr:g}"] = mean
        worth = sign * mean if math.isfinite(mean) else -math.inf
        if best is None or worth > best[0]:
            best = (worth, lr, fitted)
    assert best is not None
    _, lr, fitted = best
    cost = model.cost(task.n_positions, "decode", state_dtype_bytes=4).total
    row = {
        "name": name,
        "lr": lr,
        "tried": tried,
        "parameters": sum(p.numel() for p in fitted[0].model.parameters()),
        "state_bytes": cost.state_bytes_per_seq,
        "steps": [f.steps for f in fitted],
        "cpu_seconds": round(statistics.fmean(f.cpu_seconds for f in fitted), 1),
        "by_group": _mean_groups([f.scores for f in fitted]),
        "by_length": {
            str(length): _spread([f.by_length[length][metric_name(task)] for f in fitted])
            for length in fitted[0].by_length
        },
        "history": [f.history for f in fitted],
    }
    for key in ("accuracy", "exact", "error"):
        if key in fitted[0].scores:
            row[key] = _spread([f.scores[key] for f in fitted])
    return row


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "each": list(values),
    }


def _mean_groups(scores: Sequence[dict[str, Any]]) -> dict[str, float]:
    groups = {group: None for found in scores for group in found["by_group"]}
    return {g: statistics.fmean(s["by_group"][g] for s in scores if g in s["by_group"]) for g in groups}


def references(task: TaskConfig, settings: TrainSettings) -> dict[str, Any]:
    """Chance and what can be known, on the held-out examples of seed 0."""
    examples = task.examples(0, "valid", 0, settings.eval_examples)
    if isinstance(task, TokenTask):
        answers = np.stack([task.oracle(tokens) for tokens in examples.inputs])
        return {"chance": task.chance(), "oracle": accuracy(answers, examples)["accuracy"]}
    assert isinstance(task, VectorTask)
    return {
        "chance": 1.0,
        "oracles": {
            name: squared_error(predictions, examples) for name, predictions in task.oracles(examples.inputs).items()
        },
    }


def conditions(num_threads: int) -> dict[str, Any]:
    """What the figures depend on besides the config."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "num_threads": num_threads,
        "git_revision": git_revision(),
        "versions": versions(),
        "time": time.strftime("%Y-%m-%d"),
    }


def table(record: dict[str, Any]) -> str:
    """The record for people: a line per mixer, chance and oracle below."""
    task = validate_task(record["task"])
    metric = metric_name(task)
    n_seeds = len(record["seeds"])
    groups = _shown_groups(record)
    lengths = list(record["rows"][0]["by_length"]) if record["rows"] else []
    head = ["mixer", metric, *(["exact"] if metric == "accuracy" else []), *(f"{g}" for g in groups)]
    head += [f"at {length}" for length in lengths] + ["lr", "steps", "cpu s", "params", "state"]
    lines = [head]
    for row in record["rows"]:
        cells = [row["name"], _shown(row[metric])]
        cells += [_shown(row["exact"])] if metric == "accuracy" else []
        cells += [f"{row['by_group'][g]:.3f}" if g in row["by_group"] else "-" for g in groups]
        cells += [_shown(row["by_length"][length]) for length in lengths]
        cells += [f"{row['lr']:g}", f"{statistics.fmean(row['steps']):.0f}", f"{row['cpu_seconds']:.0f}"]
        cells += [f"{row['parameters']:,}", f"{row['state_bytes']:,}"]
        lines.append(cells)
    for name, found in record.get("oracles", {}).items():
        known = [f"{found['by_group'][g]:.3f}" if g in found["by_group"] else "-" for g in groups]
        lines.append([name, f"{found['error']:.3f}", *known])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
    note = f"{task.type}: {metric} on held-out examples, {n_seeds} seed{'s' if n_seeds > 1 else ''}"
    note += " (mean ± standard deviation)" if n_seeds > 1 else ""
    if groups:
        note += f"; columns {', '.join(groups)}: by {task.group_name}"
    last = f"chance {record['chance']:.3f}"
    if "oracle" in record:
        last += f", by rule {record['oracle']:.3f}"
    return "\n".join([note, *text, last])


def validate_task(tree: dict[str, Any]) -> TaskConfig:
    """A task from plain data."""
    return TASKS.get(tree["type"]).model_validate(tree)


def _shown(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f}" + (f"±{value['std']:.3f}" if value["std"] is not None else "")


def _shown_groups(record: dict[str, Any], most: int = 6) -> list[str]:
    groups = list(record["rows"][0]["by_group"]) if record["rows"] else []
    if len(groups) <= most:
        return groups
    return [groups[round(i * (len(groups) - 1) / (most - 1))] for i in range(most)]
