"""The result of a comparison: results.json, table.md and plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.compare.config import CompareConfig
from evals.compare.runs import NOT_TRAINED, Finished
from evals.compare.solve import Matched
from llm.config.load import config_hash
from llm.train.callbacks.environment import git_revision, versions
from llm.train.callbacks.throughput import training_flops_per_token
from llm.train.charts import smooth
from llm.train.hardware import cpu_name

N_NAMED = 14
"""Curves that have a colour and a name besides the baseline's."""

Series = tuple[str, list[Any], list[Any]]
"""(label, x, y)"""


def spread(values: Sequence[float]) -> float:
    """Half the range over seeds; nan for one seed, of which nothing is known."""
    return (max(values) - min(values)) / 2 if len(values) > 1 else math.nan


def summarise(
    config: CompareConfig,
    candidates: list[Matched],
    runs: list[Finished],
    measured: dict[str, dict[str, Any]],
    recalled: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything that the table and the plots show, as plain data."""
    rows: list[dict[str, Any]] = []
    for matched in candidates:
        own = [run for run in runs if run.candidate == matched.name]
        evals = {run.seed: run.records("eval")[-1] for run in own if run.error is None and run.records("eval")}
        seconds = [sum(r["seconds"] for r in run.records("train")) for run in own if run.seed in evals]
        rows.append(
            {
                "name": matched.name,
                "d_model": matched.model.d_model,
                "params_blocks": (matched.cost.blocks + matched.cost.wrappers).params,
                "params": matched.cost.total.params,
                "mismatch": matched.mismatch,
                "training_flops_per_token": training_flops_per_token(matched.cost),
                "bits_per_byte": {seed: found.get("bits_per_byte") for seed, found in evals.items()},
                "loss": {seed: found["loss"] for seed, found in evals.items()},
                "seconds": seconds,
                "curve": _curve(own),
                "errors": {run.seed: run.error for run in own if run.error is not None},
                "measured": measured.get(matched.name, {}),
                "recall": (recalled or {}).get(matched.name),
            }
        )
    done = next((run for run in runs if run.error is None and run.records("start")), None)
    start = done.records("start")[-1] if done is not None else {}
    for row in rows:
        row["differences"] = _differences(row["bits_per_byte"], rows[0]["bits_per_byte"])
    return {
        "tool": "compare",
        "name": config.name,
        "config": config_hash(config),
        "git": git_revision(),
        "revisions": sorted({str(r["git_revision"]) for run in runs for r in run.records("start")[-1:]}),
        "tokens": start.get("total_tokens"),
        "steps": start.get("total_steps"),
        "seeds": config.seeds,
        "match": config.match.to_dict(),
        "measure": config.measure.to_dict(),
        "recall": None if config.recall is None else config.recall.to_dict(),
        "jobs": config.jobs,
        "num_threads": config.num_threads,
        "device": cpu_name(),
        "versions": versions(),
        "rows": rows,
    }


def _differences(own: dict[int, float | None], baseline: dict[int, float | None]) -> list[float]:
    """Of the seeds that both have: the same seed means the same tokens in the same order."""
    pairs = [(own.get(seed), baseline.get(seed)) for seed in own]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _curve(runs: list[Finished]) -> list[tuple[int, float, float]]:
    """(tokens, mean over seeds of the smoothed training loss, mean seconds so far), thinned to about 60 points."""
    losses: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        records = run.records("train")
        points = smooth([(r["tokens"], r["loss"]) for r in records], 15)
        elapsed = 0.0
        for record, (_, loss) in zip(records, points, strict=False):
            elapsed += record["seconds"]
            losses.setdefault(record["tokens"], []).append((loss, elapsed))
    n_seeds = max((len(values) for values in losses.values()), default=0)
    curve = [
        (
            tokens,
            round(statistics.fmean(loss for loss, _ in values), 4),
            round(statistics.fmean(s for _, s in values), 1),
        )
        for tokens, values in sorted(losses.items())
        if len(values) == n_seeds
    ]
    return curve[:: max(1, len(curve) // 60)]


def table(result: dict[str, Any]) -> str:
    """The table in Markdown, best held-out first, with its conditions."""
    measure = result["measure"]
    lengths, contexts = [str(n) for n in measure["lengths"]], [str(n) for n in measure["contexts"]]
    rows = sorted(result["rows"], key=_rank)
    head = [
        "candidate",
        "width",
        "parameters in blocks",
        "held-out bits per byte",
        f"against {result['rows'][0]['name']}",
    ]
    head += ["training FLOPs per token", "training seconds"]
    head += [f"tokens/s at {n}" for n in lengths] + [f"decode ms after {n}" for n in contexts]
    head += [f"state bytes after {n}" for n in contexts]
    recall = result["recall"]
    pairs = [] if recall is None else [str(n) for n in recall["n_pairs"]]
    head += [f"recall of {n} pairs" for n in pairs]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row, lengths, contexts, pairs)) + " |")
    return "\n".join([*lines, "", *_conditions(result), ""])


def _rank(row: dict[str, Any]) -> float:
    mean = _mean(row)
    return math.inf if mean is None else mean


def _mean(row: dict[str, Any]) -> float | None:
    values = [value for value in row["bits_per_byte"].values() if value is not None]
    return statistics.fmean(values) if values else None


def _cells(row: dict[str, Any], lengths: list[str], contexts: list[str], pairs: list[str]) -> list[str]:
    params = f"{row['params_blocks']:,}" + (f" ({row['mismatch']:+.1%})" if abs(row["mismatch"]) > 0.01 else "")
    cells = [f"`{row['name']}`", str(row["d_model"]), params]
    mean = _mean(row)
    if mean is None:
        reason = "; ".join(dict.fromkeys(row["errors"].values()))
        cells += [reason if reason == NOT_TRAINED else f"failed: {reason}", ""]
    else:
        values = list(row["bits_per_byte"].values())
        among = f" ± {spread(values):.4f}" if len(values) > 1 else " (one seed)"
        apart = row["differences"]
        difference = f"{statistics.fmean(apart):+.4f}" if apart else ""
        cells += [f"{mean:.4f}{among}", difference + (f" ± {spread(apart):.4f}" if len(apart) > 1 else "")]
    seconds = f"{statistics.fmean(row['seconds']):,.0f}" if row["seconds"] else ""
    cells += [f"{row['training_flops_per_token']:,.0f}", seconds]
    measured = row["measured"]

    def shown(key: str, at: str, scale: float, form: str) -> str:
        value = (measured.get(key) or {}).get(at)
        return "" if value is None else format(value * scale, form)

    cells += [shown("tokens_per_second", n, 1, ",.0f") for n in lengths]
    cells += [shown("decode_seconds", n, 1e3, ".1f") for n in contexts]
    cells += [shown("state_bytes", n, 1, ",.0f") for n in contexts]
    recalled = (row["recall"] or {}).get("by_pairs") or {}
    return cells + ["" if recalled.get(n) is None else f"{recalled[n]:.3f}" for n in pairs]


def _conditions(result: dict[str, Any]) -> list[str]:
    match = result["match"]
    equal = (
        "Candidates are not made equal."
        if match["what"] == "none"
        else f"Widths are chosen so that {match['what']} of the {match['of']} match; a mismatch above 1% is shown."
    )
    tokens = result["tokens"]
    trained_at = ", ".join(revision[:12] for revision in result["revisions"])
    measure = result["measure"]
    speed = f"; speed measured alone, {measure['num_threads']} thread(s), fp32" if measure["lengths"] else ""
    return [
        f"{tokens:,} tokens in {result['steps']:,} steps, the same in the same order for all; seeds "
        f"{', '.join(str(seed) for seed in result['seeds'])}: mean ± half the range, differences seed by seed. {equal}"
        if tokens
        else equal,
        f"{result['device']}, {result['num_threads']} thread(s) a training, whose seconds are those of a shared "
        f"machine{speed}. torch {result['versions'].get('torch')}, config {result['config']}, "
        f"trained at revision {trained_at}.",
        *_recall_conditions(result["recall"]),
    ]


def _recall_conditions(recall: dict[str, Any] | None) -> list[str]:
    """What the columns of recall are of."""
    if recall is None:
        return []
    return [
        f"Recall: share of right answers of one block at width {recall['d_model']} behind a layer over two tokens, "
        f"trained for it for at most {recall['steps']} steps (Muon, the best of the rates {recall['lrs']}), seeds "
        f"{recall['seeds']}; {recall['length']} tokens, {recall['vocab_size']} ids. One of the values at random would "
        "be right in 1 / pairs. Empty for wrappers."
    ]


def plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files of the curves, the baseline and the best in colour, the others grey; an empty list where matplotlib is
    not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    made = []
    rows = [row for row in result["rows"] if row["curve"]]
    best = [row["name"] for row in sorted(result["rows"], key=_rank)]
    shown = list(dict.fromkeys([result["rows"][0]["name"], *best[:N_NAMED]]))
    colors = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(shown)}

    def draw(name: str, x_label: str, y_label: str, series: list[Series], **scales: str) -> None:
        if not any(xs for _, xs, _ in series):
            return
        figure, axes = pyplot.subplots(figsize=(9, 5.5))
        for label, xs, ys in series:
            named = label in colors
            marker = "o" if len(xs) <= 6 else None
            color, known_as = (colors[label], label) if named else ("0.8", None)
            axes.plot(xs, ys, label=known_as, color=color, linewidth=1.2, marker=marker, zorder=2 if named else 1)
        axes.set(xlabel=x_label, ylabel=y_label, **scales)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        path = folder / f"{result['name']}-{name}.png"
        figure.savefig(path, dpi=80, bbox_inches="tight")
        pyplot.close(figure)
        made.append(path)

    curves = {row["name"]: row["curve"] for row in rows}
    flops = {row["name"]: row["training_flops_per_token"] for row in rows}
    skip = 0.1

    def late(name: str) -> list[tuple[int, float, float]]:
        curve = curves[name]
        return [point for point in curve if point[0] >= skip * curve[-1][0]]

    loss = "training loss (nats per token)"
    by_tokens = [(name, [p[0] for p in late(name)], [p[1] for p in late(name)]) for name in curves]
    by_flops = [(name, [p[0] * flops[name] for p in late(name)], [p[1] for p in late(name)]) for name in curves]
    by_seconds = [(name, [p[2] for p in late(name)], [p[1] for p in late(name)]) for name in curves]
    draw("loss-tokens", "tokens", loss, by_tokens)
    draw("loss-flops", "training FLOPs", loss, by_flops, xscale="log")
    draw("loss-seconds", "seconds of training", loss, by_seconds, xscale="log")
    for key, name, x_label, y_label in (
        ("tokens_per_second", "throughput", "tokens in a row", "tokens per second, forward and backward"),
        ("decode_seconds", "decode", "tokens of context", "seconds per decoded token"),
        ("state_bytes", "state", "tokens of context", "bytes of decode state (fp32)"),
    ):
        found = [(row["name"], row["measured"].get(key) or {}) for row in result["rows"]]
        series = [(label, [int(x) for x in values], list(values.values())) for label, values in found if values]
        draw(name, x_label, y_label, series, xscale="log", yscale="log")
    return made


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write results.json, table.md and the plots into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['name']}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    text = table(result)
    (folder / f"{result['name']}.md").write_text(text, encoding="utf-8")
    return [folder / f"{result['name']}.md", folder / f"{result['name']}.json", *plots(result, folder)]
