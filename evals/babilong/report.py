"""What came of an evaluation: a table in Markdown, heat maps, and one page that needs no other file."""

from __future__ import annotations

import datetime
import html
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from evals.babilong.results import N_DEPTHS
from llm.train.report import TEMPLATE

NAMES = {"right": "official metric", "right_fixed": "fixed metric"}


class HeatMap(NamedTuple):
    """cells: by name of the row and name of the column."""

    file: str
    title: str
    names: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], dict[str, Any]]


def short(length: int | str) -> str:
    """4000 as 4k, 1000000 as 1M."""
    n = int(length)
    for unit, sign in ((1_000_000, "M"), (1000, "k")):
        if n >= unit and n % (unit // 10) == 0:
            return f"{n / unit:g}{sign}"
    return str(n) if n else "0k"


def metrics_of(summary: dict[str, Any]) -> list[str]:
    """Both metrics, or one where they mean the same."""
    return ["right", "right_fixed"] if summary["conditions"]["form"] == "prompt" else ["right"]


def _percent(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell['share']:.1f} ({100 * cell['low']:.0f}-{100 * cell['high']:.0f})"


def rows_of(summary: dict[str, Any], metric: str) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of one metric."""
    head = ["task", "chance", *(short(n) for n in summary["lengths"])]
    rows = []
    for task in summary["tasks"]:
        cells = summary["cells"][metric][task]
        rows.append(
            [task, f"{100 * summary['chance'][task]:.1f}", *(_percent(cells.get(str(n))) for n in summary["lengths"])]
        )
    means = summary["mean_qa1_5"][metric]
    if means:
        rows.append(["mean of qa1-5", "", *(_percent(means.get(str(n))) for n in summary["lengths"])])
    return head, rows


def conditions(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, how) of the conditions."""
    found = []
    for name, value in summary["conditions"].items():
        text = value if isinstance(value, str) else json.dumps(value)
        found.append((name.replace("_", " "), text))
    counts = {cell["n"] for cells in summary["cells"]["right"].values() for cell in cells.values()}
    found.append(("samples in a cell", ", ".join(map(str, sorted(counts)))))
    read = ", ".join(
        f"{short(n)}: {t['n_context']:g} ({t['n_bytes']:g} bytes) / {t['n_read']:g}"
        for n, t in summary["tokens"].items()
    )
    return [*found, ("tokens of the context / read in all, mean", read)]


def table(summary: dict[str, Any]) -> str:
    """The tables in Markdown, with the conditions."""
    lines: list[str] = []
    for metric in metrics_of(summary):
        head, rows = rows_of(summary, metric)
        title = f" ({NAMES[metric]})" if len(metrics_of(summary)) > 1 else ""
        lines += [f"Right answers in percent{title}, 95% interval in brackets:", ""]
        lines += [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    lines += [f"- {name}: {text}" for name, text in conditions(summary)]
    return "\n".join([*lines, ""])


def heat_maps(summary: dict[str, Any]) -> list[HeatMap]:
    """Tasks by lengths; for each task whose answer follows from one fact, depths by lengths."""
    lengths = [short(n) for n in summary["lengths"]]
    cells = {
        (task, short(n)): value
        for task in summary["tasks"]
        for n, value in summary["cells"]["right_fixed"][task].items()
    }
    metric = " (fixed metric)" if len(metrics_of(summary)) > 1 else ""
    maps = [HeatMap("heatmap", f"Right answers, %{metric}", list(summary["tasks"]), lengths, cells)]
    for task, by_length in summary["depths"].items():
        if by_length:
            step = 100 // N_DEPTHS
            names = [f"{step * i}-{step * (i + 1)}%" for i in range(N_DEPTHS)]
            deep = {(names[int(i)], short(n)): c for n, cells_ in by_length.items() for i, c in cells_.items()}
            title = f"{task} by depth of the fact, %{metric}"
            maps.append(HeatMap(f"depth-{task}", title, names, [short(n) for n in by_length], deep))
    return maps


def write(summary: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """summary.json, table.md, PNG files where matplotlib is installed, report.html."""
    files = {"summary.json": json.dumps(summary, indent=1) + "\n", "table.md": table(summary)}
    files["report.html"] = page(summary, name)
    written = []
    for file, text in files.items():
        temporary = folder / f"{file}.new"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / file)
        written.append(folder / file)
    if importlib.util.find_spec("matplotlib") is not None:
        for drawn in heat_maps(summary):
            _png(folder / f"{drawn.file}.png", drawn)
            written.append(folder / f"{drawn.file}.png")
    return written


def _png(path: Path, drawn: HeatMap) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _, title, names, columns, cells = drawn
    nothing = float("nan")
    figure = Figure(figsize=(2.2 + 0.75 * len(columns), 1.5 + 0.42 * len(names)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = [[100 * cells[r, c]["share"] if (r, c) in cells else nothing for c in columns] for r in names]
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share == share:
                color = "white" if share < 60 else "black"
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens", fontsize=8)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def heat_map_svg(drawn: HeatMap) -> str:
    """The same as an <svg> element in the page's colours."""
    _, title, names, columns, cells = drawn
    left, top, width, height = 90, 34, 74, 30
    total_width, total_height = max(360, left + width * len(columns) + 4), top + height * len(names) + 30
    label = html.escape(title)
    out = [
        f'<svg viewBox="0 0 {total_width} {total_height}" style="max-width:{total_width}px" role="img" '
        f'aria-label="{label}" class="chart"><text x="0" y="16" class="title">{label}</text>'
    ]
    for y, name in enumerate(names):
        at = top + height * y
        out.append(f'<text x="{left - 8}" y="{at + 20}" class="tick" text-anchor="end">{html.escape(name)}</text>')
        for x, column in enumerate(columns):
            found = cells.get((name, column))
            if found is None:
                continue
            share = found["share"]
            place = f'x="{left + width * x}" y="{at}" width="{width - 2}" height="{height - 2}"'
            told = f"{name} at {column}: {_percent(found)}, n = {found['n']}"
            out.append(f'<rect {place} rx="3" fill="var(--c0)" fill-opacity="{0.08 + 0.8 * share:.3f}">')
            out.append(f"<title>{html.escape(told)}</title></rect>")
            middle = left + width * x + width / 2 - 1
            out.append(f'<text x="{middle}" y="{at + 19}" class="title" text-anchor="middle">{100 * share:.0f}</text>')
    for x, column in enumerate(columns):
        at_x, at_y = left + width * x + width / 2, top + height * len(names) + 18
        out.append(f'<text x="{at_x}" y="{at_y}" class="tick" text-anchor="middle">{html.escape(column)}</text>')
    return "\n".join([*out, "</svg>"])


def page(summary: dict[str, Any], name: str) -> str:
    """The HTML page, in the style of a run's report."""
    found = re.search(r"<style>.*?</style>", TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    tiles = [(f"samples of {len(summary['tasks'])} tasks", f"{summary['n_samples']:,}")]
    metric = metrics_of(summary)[0]
    for length, mean in summary["mean_qa1_5"][metric].items():
        tiles.append((f"mean of qa1-5 at {short(length)}, %", f"{100 * mean['share']:.1f}"))
    charts = [heat_map_svg(drawn) for drawn in heat_maps(summary)]
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="sub">BABILong, {html.escape(summary["conditions"]["label"])}</p>',
        '<div class="tiles">',
        *(f'<div class="tile"><b>{value}</b><span>{html.escape(label)}</span></div>' for label, value in tiles),
        "</div>",
        *(f'<div class="card">{chart}</div>' for chart in charts[:1]),
        *(f'<div class="card" style="margin-top:12px">{chart}</div>' for chart in charts[1:]),
    ]
    for metric in metrics_of(summary):
        head, rows = rows_of(summary, metric)
        parts.append(f"<h2>Right answers in percent, {NAMES[metric]}</h2>")
        parts.append('<p class="sub">In brackets the 95% interval.</p>')
        parts.append(_html_table(head, rows, numeric=True))
    parts.append("<h2>Conditions</h2>")
    parts.append(_html_table([], [list(pair) for pair in conditions(summary)], numeric=False))
    written = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    parts.append(f"<footer>Written {written} from samples.jsonl by Manyformer.</footer>")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(name)} · BABILong</title>",
            found[0],
            "</head>\n<body><main>",
            *parts,
            "</main></body></html>\n",
        ]
    )


def _html_table(head: list[str], rows: list[list[str]], *, numeric: bool) -> str:
    kind = "n" if numeric else "wide"
    names = "".join(f'<th class="{kind if i else "wide"}">{html.escape(cell)}</th>' for i, cell in enumerate(head))
    lines = [
        "<tr>" + "".join(f'<td class="{kind if i else ""}">{html.escape(c)}</td>' for i, c in enumerate(row)) + "</tr>"
        for row in rows
    ]
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>' + "\n".join(lines) + "</tbody></table></div>"
