"""Line charts as inline SVG, without any package. Colours come from the page's CSS: classes `c0`, `c1`, ..."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """points: (x, y) with x ascending. style: "line", "faint" (a thin line in the background) or "dots"."""

    name: str
    points: Points
    color: int = 0
    style: str = "line"


def downsample(points: Points, limit: int = 600) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of an equal share; values that are not finite are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) <= limit:
        return finite
    binned = []
    for index in range(limit):
        part = finite[index * len(finite) // limit : (index + 1) * len(finite) // limit]
        binned.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return binned


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Mean of the `window` finite values around each point, of fewer near both ends, so that nothing lags."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    sums = [0.0]
    for _, y in finite:
        sums.append(sums[-1] + y)
    smoothed = []
    for index, (x, _) in enumerate(finite):
        half = min(window // 2, index, len(finite) - 1 - index)
        smoothed.append((x, (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)))
    return smoothed


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About n round values within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * factor for factor in (1, 2, 2.5, 5) if power * factor >= raw), power * 10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2, 5 times powers of ten within [low, high], thinned to powers of ten when there are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        values = [factor * 10.0**e for e in exponents for factor in factors if low <= factor * 10.0**e <= high]
        if len(values) <= 7:
            break
    return values or [low, high]


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    width: int = 880,
    height: int = 340,
    log_y: bool = False,
    format_x: Callable[[float], str] = "{:g}".format,
    format_y: Callable[[float], str] = "{:g}".format,
) -> str:
    """An <svg> element; "" when there is nothing to draw. The y axis begins near the smallest value, not at zero."""
    drawn = [Series(s.name, downsample(s.points), s.color, s.style) for s in series]
    if log_y:
        drawn = [Series(s.name, [(x, y) for x, y in s.points if y > 0], s.color, s.style) for s in drawn]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    all_x = [x for s in drawn for x, _ in s.points]
    all_y = [y for s in drawn for _, y in s.points]
    x_low, x_high = min(all_x), max(all_x)
    y_low, y_high = _y_range(all_y, log_y)
    left, right, top, bottom = 56, 14, 34, 38
    inner_width, inner_height = width - left - right, height - top - bottom

    def at_x(x: float) -> float:
        return left + inner_width * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def at_y(y: float) -> float:
        if log_y:
            share = (math.log(y) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        else:
            share = (y - y_low) / (y_high - y_low)
        return top + inner_height * (1 - share)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" class="chart">']
    out.append(f'<text x="{left}" y="16" class="title">{html.escape(title)}</text>')
    for y in log_ticks(y_low, y_high) if log_y else ticks(y_low, y_high):
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}" class="grid"/>')
        out.append(f'<text x="{left - 7}" y="{at_y(y) + 4:.1f}" class="tick" text-anchor="end">{format_y(y)}</text>')
    for x in ticks(x_low, x_high, max(3, inner_width // 120)):
        out.append(
            f'<text x="{at_x(x):.1f}" y="{height - bottom + 17}" class="tick" text-anchor="middle">{format_x(x)}</text>'
        )
    out.append(
        f'<text x="{width - right}" y="{height - 4}" class="tick" text-anchor="end">{html.escape(x_label)}</text>'
    )
    for s in sorted(drawn, key=lambda s: {"faint": 0, "line": 1, "dots": 2}[s.style]):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in s.points)
        out.append(f'<polyline points="{path}" class="c{s.color} {s.style}"/>')
        if s.style == "dots":
            out += [
                f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" class="c{s.color}">'
                f"<title>{html.escape(s.name)}: {y:.6g} at {format_x(x)}</title></circle>"
                for x, y in s.points
            ]
    out += _legend([s for s in drawn if s.style != "faint"], width - right)
    return "\n".join([*out, "</svg>"])


def _y_range(values: Sequence[float], log_y: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log_y:
        return (low / 1.15, high * 1.15)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return low - (0 if low == 0 else margin), high + margin


def _legend(series: Sequence[Series], right: float) -> list[str]:
    if len(series) < 2:
        return []
    out, x = [], right
    for s in reversed(series):
        x -= 6.6 * len(s.name) + 4
        out.append(f'<text x="{x:.0f}" y="16" class="tick">{html.escape(s.name)}</text>')
        out.append(f'<line x1="{x - 20:.0f}" x2="{x - 5:.0f}" y1="12" y2="12" class="c{s.color} line"/>')
        x -= 34
    return out
