"""The report of a run: loss.png and a self-contained report.html, from metrics.jsonl and config.yaml alone.

python -m llm.train.report runs/NAME
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from llm.core.errors import UserError
from llm.train.callbacks.console import duration, human
from llm.train.callbacks.jsonl import FILE_NAME, read_metrics
from llm.train.charts import Series, chart, smooth

TEMPLATE = Path(__file__).with_name("report.html.jinja")
Records = list[dict[str, Any]]


def write_report(run_dir: Path) -> Path:
    """Write loss.png and report.html into `run_dir`; returns the path of the report.

    Without matplotlib there is no PNG (the page draws its curves as SVG); without jinja2 it is a plain report.txt.
    UserError when the folder holds no run.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / FILE_NAME)
    by_kind: dict[str, Records] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    if _has("matplotlib"):
        write_png(by_kind, run_dir / "loss.png")
    else:
        print("loss.png left out: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    config_path = run_dir / "config.yaml"
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    if _has("jinja2"):
        return _replace(run_dir / "report.html", render(by_kind, config, run_dir.name))
    print("plain report.txt instead of report.html: jinja2 is not installed (pip install jinja2)", file=sys.stderr)
    return _replace(run_dir / "report.txt", render_text(by_kind, config, run_dir.name))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _replace(path: Path, text: str) -> Path:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def summary(by_kind: dict[str, Records]) -> list[tuple[str, str]]:
    """(label, value) of what one wants to know first."""
    start, train, evals = _last(by_kind, "start"), by_kind.get("train", []), by_kind.get("eval", [])
    tiles: list[tuple[str, str]] = []
    if evals:
        tiles.append(("held-out loss, nats", f"{evals[-1]['loss']:.4f}"))
        if "bits_per_byte" in evals[-1]:
            tiles.append(("held-out bits per byte", f"{evals[-1]['bits_per_byte']:.4f}"))
    if train:
        tail = [record["loss"] for record in train[-max(1, len(train) // 50) :]]
        tiles.append(
            (
                f"training loss, last {len(tail)} steps" if len(tail) > 1 else "training loss",
                f"{statistics.fmean(tail):.4f}",
            )
        )
        tiles.append(("tokens seen", human(train[-1]["tokens"])))
        tiles.append(("time in steps", duration(sum(record["seconds"] for record in train))))
        speeds = [record["tokens_per_second"] for record in train if "tokens_per_second" in record]
        if speeds:
            tiles.append(("tokens per second, median", human(statistics.median(speeds))))
        mfu = statistics.median([record.get("mfu", 0.0) for record in train])
        if mfu:
            tiles.append(("MFU, median", f"{100 * mfu:.1f}%"))
        memory = max(record.get("memory_gib", 0.0) for record in train)
        if memory:
            tiles.append(("peak memory per rank", f"{memory:.2f} GiB"))
    if "parameters" in start:
        tiles.append(("parameters", human(start["parameters"])))
    return tiles


def _last(by_kind: dict[str, Records], kind: str) -> dict[str, Any]:
    return by_kind[kind][-1] if by_kind.get(kind) else {}


def status(by_kind: dict[str, Records]) -> tuple[str, str]:
    """(what became of the run, CSS class)."""
    end = _last(by_kind, "end")
    if not end:
        return "running, or killed", "open"
    if end["reason"] == "done":
        return "done", "good"
    return (end["reason"] if len(end["reason"]) < 90 else end["reason"][:87] + "..."), "open" if end[
        "reason"
    ] == "stopped" else "bad"


def losses(
    by_kind: dict[str, Records],
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[tuple[float, float]]]:
    """(training, smoothed training, held-out) points of tokens and loss."""
    train = [(float(record["tokens"]), record["loss"]) for record in by_kind.get("train", [])]
    held_out = [(float(record["tokens"]), record["loss"]) for record in by_kind.get("eval", [])]
    return train, smooth(train, max(1, len(train) // 50)), held_out


def render(by_kind: dict[str, Records], config: str, fallback_name: str) -> str:
    """The HTML page; it needs no other file."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    start = _last(by_kind, "start")
    state, state_class = status(by_kind)
    train, smoothed, held_out = losses(by_kind)
    loss_chart = chart(
        [
            Series("each step", train, 0, "faint"),
            Series("training", smoothed, 0),
            Series("held-out", held_out, 1, "dots"),
        ],
        title="Loss, nats per token", x_label="tokens", format_x=human,
    )  # fmt: skip
    return template.render(
        name=start.get("name", fallback_name),
        status=state,
        status_class=state_class,
        subtitle=_subtitle(by_kind),
        tiles=[{"label": label, "value": value} for label, value in summary(by_kind)],
        loss_chart=Markup(loss_chart),
        small_charts=[Markup(svg) for svg in _small_charts(by_kind) if svg],
        tables=_tables(by_kind),
        samples=by_kind.get("sample", [])[-5:],
        config=config,
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def _subtitle(by_kind: dict[str, Records]) -> str:
    start, train = _last(by_kind, "start"), by_kind.get("train", [])
    machine = start.get("hardware", {})
    parts = [f"step {train[-1]['step'] if train else 0:,} of {start.get('total_steps', 0):,}"]
    if machine:
        world = machine.get("world_size", 1)
        parts.append(
            f"{start.get('strategy', '')} on {f'{world} x ' if world > 1 else ''}{machine.get('device_name', '')}"
        )
    if start.get("git_revision"):
        revision = start["git_revision"]
        parts.append(f"revision {revision[:10]}{' with local changes' if revision.endswith('-dirty') else ''}")
    if start.get("config_hash"):
        parts.append(f"config {start['config_hash'][:10]}")
    return " · ".join(parts)


def _small_charts(by_kind: dict[str, Records]) -> list[str]:
    def points(key: str) -> list[tuple[float, float]]:
        return [(float(record["tokens"]), float(record[key])) for record in by_kind.get("train", []) if key in record]

    common: dict[str, Any] = {"x_label": "tokens", "format_x": human, "width": 450, "height": 220}
    bits = [(float(r["tokens"]), r["bits_per_byte"]) for r in by_kind.get("eval", []) if "bits_per_byte" in r]
    charts = [
        chart([Series("bits per byte", bits, 1, "dots")], title="Held-out bits per byte", **common)
        if len(bits) > 1
        else "",
        chart([Series("learning rate", points("lr"))], title="Learning rate", **common),
        chart([Series("gradient norm", points("grad_norm"))], title="Gradient norm", log_y=True, **common),
        chart([Series("speed", points("tokens_per_second"))], title="Tokens per second", format_y=human, **common),
    ]
    mfu = points("mfu")
    if any(y for _, y in mfu):
        charts.append(chart([Series("MFU", [(x, 100 * y) for x, y in mfu])], title="MFU, %", **common))
    return charts


def _tables(by_kind: dict[str, Records]) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    evals = by_kind.get("eval", [])
    if evals:
        shown = evals if len(evals) <= 12 else [*evals[:: -(-len(evals) // 11)], evals[-1]]
        rows = [
            [
                f"{r['step']:,}", human(r["tokens"]), f"{r['loss']:.4f}", f"{r['perplexity']:.4g}",
                f"{r['bits_per_byte']:.4f}" if "bits_per_byte" in r else "-", human(r["num_tokens"]),
            ]
            for index, r in enumerate(shown) if index == 0 or r is not shown[index - 1]
        ]  # fmt: skip
        head = ["step", "tokens seen", "loss", "perplexity", "bits per byte", "tokens scored"]
        tables.append({"title": "Held-out evaluations", "head": head, "rows": rows, "numeric": True})
    if by_kind.get("anomaly"):
        rows = [[f"{r['step']:,}", r["action"], r["reason"]] for r in by_kind["anomaly"][-20:]]
        note = f"{len(by_kind['anomaly'])} in all, the last ones below" if len(by_kind["anomaly"]) > 20 else ""
        tables.append({"title": "Anomalies", "head": ["step", "action", "reason"], "rows": rows, "note": note})
    saved = by_kind.get("checkpoint", [])
    if saved:
        rows = [[f"{r['step']:,}", human(r["tokens"]), r["saved_as"], r["path"]] for r in saved[-5:]]
        tables.append(
            {"title": f"Checkpoints ({len(saved)} saved)", "head": ["step", "tokens", "kind", "folder"], "rows": rows}
        )
    start = _last(by_kind, "start")
    machine = start.get("hardware", {})
    if machine:
        rows = [[_words(key), _machine_value(key, value)] for key, value in machine.items() if value not in ("", None)]
        rows += [["versions", ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items())]]
        rows += [["command", " ".join(start.get("command", []))]]
        starts = [r["step"] for r in by_kind["start"]]
        if len(starts) > 1:
            rows += [["started again at steps", ", ".join(f"{step:,}" for step in starts[1:])]]
        tables.append({"title": "Conditions", "head": [], "rows": rows})
    return tables


def _words(key: str) -> str:
    return key.removesuffix("_bytes").removeprefix("num_").replace("_", " ")


def _machine_value(key: str, value: Any) -> str:
    return f"{value / 2**30:.1f} GiB" if key.endswith("_bytes") else str(value)


def render_text(by_kind: dict[str, Records], config: str, fallback_name: str) -> str:
    """The report as plain text."""
    lines = [f"{_last(by_kind, 'start').get('name', fallback_name)}: {status(by_kind)[0]}", _subtitle(by_kind), ""]
    lines += [f"{label:<32} {value}" for label, value in summary(by_kind)]
    for table in _tables(by_kind):
        rows = ([table["head"]] if table["head"] else []) + table["rows"]
        widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
        lines += ["", table["title"]]
        lines += [
            "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
    for sample in by_kind.get("sample", [])[-5:]:
        lines += ["", f"Sample at step {sample['step']}", sample["prompt"] + sample["text"]]
    return "\n".join([*lines, "", "Configuration", config])


def write_png(by_kind: dict[str, Records], path: Path) -> None:
    """The loss curve as a picture; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    train, smoothed, held_out = losses(by_kind)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#2563c9", alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*smoothed, strict=True), color="#2563c9", linewidth=1.8, label="training")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#d2541b", linewidth=1.2, marker="o", markersize=3.5, label="held-out"
        )
        last = by_kind["eval"][-1]
        text = f"{last['loss']:.3f}" + (f"\n{last['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in last else "")
        axes.annotate(
            text, held_out[-1], xytext=(-6, 10), textcoords="offset points", ha="right", fontsize=9, color="#d2541b"
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(_last(by_kind, "start").get("name", path.parent.name), loc="left", fontsize=11)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    temporary = path.with_name(path.name + ".new")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m llm.train.report RUN_DIR")
    try:
        print(write_report(Path(sys.argv[1])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
