"""Put a model to retrieval tasks: samples in batches, results kept as they come, a table and heat maps."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evals.heatmap import heat_map
from evals.records import Records, wilson_interval
from evals.retrieval.base import Sample, Sampler, Task
from evals.retrieval.options import TASKS, RetrievalOptions
from evals.retrieval.text import read_background
from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.generate.engine import Engine
from llm.generate.load import DTYPES, load_model, pick_device
from llm.generate.prefix import fingerprint
from llm.generate.sampling import Sampling
from llm.models.decoder import DecoderLike

N_BINS = 10


def score(answer: str, wanted: Sequence[str]) -> float:
    """Share of the wanted texts that the answer contains, whatever their case (RULER's string match)."""
    lower = answer.lower()
    return sum(text.lower() in lower for text in wanted) / len(wanted)


def run_retrieval(options: RetrievalOptions) -> dict[str, Any]:
    """Evaluate, print a table on stderr, write the folder; returns the summary."""
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("evaluate retrieval runs in one process; start it without torchrun")
    path, device = Path(options.run), pick_device(options.device)
    model, tokenizer, _ = load_model(
        path,
        device=device,
        dtype=DTYPES[options.precision],
        tokenizer=options.tokenizer,
        quantize=options.quantize,
    )
    most = model.config.max_context
    if most is not None and max(options.lengths) > most:
        raise UserError(f"lengths holds {max(options.lengths)}, the model's position table has {most}; leave it out")
    sampler = Sampler(tokenizer, read_background(tuple(options.essays)), seed=options.seed, depths=options.depths)
    for length in options.lengths:
        for name in options.tasks:
            sampler(TASKS[name], length, 0)
    folder = _folder(path, options)
    about = {"model": fingerprint(model)[:16], "tokenizer": tokenizer.hash[:16], **options.conditions()}
    records = Records(folder / "samples.jsonl", about)
    for length in options.lengths:
        for name in options.tasks:
            cell = [f"{name}/{length}/{i}" for i in range(options.samples)]
            missing = [i for i, sample_id in enumerate(cell) if sample_id not in records.done]
            for first in range(0, len(missing), options.batch):
                samples = [sampler(TASKS[name], length, i) for i in missing[first : first + options.batch]]
                records.add(answer(model, tokenizer, TASKS[name], samples, options.chunk))
            found = statistics.fmean(records.done[sample_id]["score"] for sample_id in cell)
            print(f"{name} at {length}: {100 * found:.1f}", file=sys.stderr)
    trained = model.config.max_seq_len
    if max(options.lengths) > trained:
        print(f"lengths above {trained} tokens are longer than the model's max_seq_len", file=sys.stderr)
    result = {"model": options.run, "max_seq_len": trained, "conditions": about, **summarise(options, records)}
    _write(folder, result, options)
    print(table(result), file=sys.stderr)
    return result


def answer(
    model: DecoderLike, tokenizer: Tokenizer, task: Task, samples: Sequence[Sample], chunk: int
) -> list[dict[str, Any]]:
    """Greedy answers to samples, read `chunk` tokens at once."""
    context = max(len(sample.ids) for sample in samples) + task.max_new_tokens
    engine = Engine(model, eos_id=tokenizer.eos_id, max_batch=len(samples), prefill_chunk=chunk, context=context)
    made = engine.generate(
        [sample.ids for sample in samples], Sampling(temperature=0, max_new_tokens=task.max_new_tokens)
    )
    rows = []
    for sample, completion in zip(samples, made, strict=True):
        text = tokenizer.decode(completion.tokens)
        rows.append(
            {
                "id": sample.id,
                "task": sample.task,
                "length": sample.length,
                "index": sample.index,
                "n_prompt": len(sample.ids),
                "depth": sample.depth,
                "wanted": sample.answers,
                "answer": text,
                "score": score(text, sample.answers),
            }
        )
    return rows


def summarise(options: RetrievalOptions, records: Records) -> dict[str, Any]:
    """Means with 95 % intervals by task and length, and means by depth for tasks whose answer stands at one."""
    cells: dict[str, dict[str, Any]] = {}
    depths: dict[str, dict[str, list[float | None]]] = {}
    for name in options.tasks:
        cells[name], depths[name] = {}, {}
        for length in options.lengths:
            rows = [records.done[f"{name}/{length}/{i}"] for i in range(options.samples)]
            mean = statistics.fmean(row["score"] for row in rows)
            low, high = wilson_interval(mean * len(rows), len(rows))
            n_prompt = round(statistics.fmean(row["n_prompt"] for row in rows), 1)
            cells[name][str(length)] = {"score": mean, "low": low, "high": high, "n": len(rows), "n_prompt": n_prompt}
            if TASKS[name].has_depth:
                bins: list[list[float]] = [[] for _ in range(N_BINS)]
                for row in rows:
                    bins[min(N_BINS - 1, int(N_BINS * row["depth"]))].append(row["score"])
                depths[name][str(length)] = [statistics.fmean(own) if own else None for own in bins]
    return {"cells": cells, "depths": {name: own for name, own in depths.items() if own}}


def table(result: dict[str, Any]) -> str:
    """Scores in percent with their intervals, in Markdown."""
    cells = result["cells"]
    lengths = list(next(iter(cells.values())))
    lines = [f"| task | {' | '.join(lengths)} |", "|---|" + "---:|" * len(lengths)]
    for name, own in cells.items():
        shown = [f"{100 * c['score']:.1f} ({100 * c['low']:.0f}-{100 * c['high']:.0f})" for c in own.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _folder(path: Path, options: RetrievalOptions) -> Path:
    if options.out is not None:
        return Path(options.out)
    return (path.parent.parent if path.parent.name == "checkpoints" else path) / "retrieval"


def _write(folder: Path, result: dict[str, Any], options: RetrievalOptions) -> None:
    """summary.json, table.md and heat maps: all tasks by length, and one by depth for each task that has one."""
    lengths = [str(length) for length in options.lengths]
    try:
        (folder / "summary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(table(result) + "\n", encoding="utf-8")
        values = [[result["cells"][name][length]["score"] for length in lengths] for name in options.tasks]
        drawn = heat_map(folder / "tasks.png", "score in percent by length in tokens", lengths, options.tasks, values)
        for name, own in result["depths"].items():
            rows = [f"{100 * i // N_BINS}-{100 * (i + 1) // N_BINS} %" for i in range(N_BINS)]
            by_depth = [[own[length][i] for length in lengths] for i in range(N_BINS)]
            heat_map(folder / f"{name}.png", f"{name}: score by depth and length", lengths, rows, by_depth)
    except OSError as error:
        raise UserError(f"cannot write the results to {folder}: {error.strerror or error}") from error
    print(f"wrote {folder}" + ("" if drawn else " (no heat maps: matplotlib is not installed)"), file=sys.stderr)
