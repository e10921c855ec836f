"""A heat map of scores, as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def heat_map(
    path: str | Path, title: str, columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float | None]]
) -> bool:
    """Draw values in [0, 1], [rows, columns], None where there is none; False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.8 * len(columns), 1.5 + 0.4 * len(rows)))
    image = axes.imshow(shown, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=9)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    return True
