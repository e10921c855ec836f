"""Three small tasks of lm-eval made of the running Python's standard library, one for each kind of request; nothing is
fetched.

| task | request | asks |
|---|---|---|
| stdlib_next_line | loglikelihood | which of four lines comes next, of which three are from elsewhere |
| stdlib_text | loglikelihood_rolling | perplexity of the beginnings of files |
| stdlib_rest_of_line | generate_until | the rest of a line |
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from llm.config.yaml_io import dump_yaml

TASKS = ("stdlib_next_line", "stdlib_text", "stdlib_rest_of_line")
N_CONTEXT_LINES = 6
N_CHOICES = 4


def read_library(max_bytes: int = 400_000) -> list[str]:
    """Texts of modules of the standard library, in the order of their names, about max_bytes in all."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if max_bytes <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            texts.append(text)
            max_bytes -= len(text)
    return texts


def write_tasks(folder: Path, *, n: int = 32, text_chars: int = 1500, seed: int = 0) -> Path:
    """Write the YAML files and their data with n samples of each task; returns the folder, for include_path."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    texts = read_library()
    lines = [text.splitlines() for text in texts]
    lines = [own for own in lines if len(own) > 2 * N_CONTEXT_LINES]
    pool = sorted({line for own in lines for line in own if len(line.strip()) > 8})
    choices: list[dict[str, Any]] = []
    rests: list[dict[str, Any]] = []
    while len(choices) < n or len(rests) < n:
        own = lines[int(rng.integers(len(lines)))]
        at = int(rng.integers(N_CONTEXT_LINES, len(own)))
        line, context = own[at], "\n".join(own[at - N_CONTEXT_LINES : at]) + "\n"
        if len(line.strip()) <= 8 or not context.strip():
            continue
        wrong = [pool[int(i)] for i in rng.choice(len(pool), N_CHOICES, replace=False) if pool[int(i)] != line]
        answer = int(rng.integers(N_CHOICES))
        options = [*wrong[:answer], line, *wrong[answer : N_CHOICES - 1]]
        if len(options) == N_CHOICES:
            choices.append({"context": context, "choices": options, "answer": answer})
            cut = len(line) - len(line.lstrip()) + 4
            rests.append({"context": context + line[:cut], "answer": line[cut:].strip()})
    pieces = [text[:text_chars] for text in texts][:n]
    _task(folder, TASKS[0], choices[:n], {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    })  # fmt: skip
    _task(folder, TASKS[1], [{"text": piece} for piece in pieces], {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    })  # fmt: skip
    _task(folder, TASKS[2], rests[:n], {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [_metric("exact_match")],
    })  # fmt: skip
    return folder


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _task(folder: Path, name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(dump_yaml(tree), encoding="utf-8")
