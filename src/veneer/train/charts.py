"""Charts as SVG text: they scale, follow the page's light or dark colours, and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34


@dataclass
class Series:
    """A named course of points; ``colour`` is one of the page's ``--c1`` to ``--c4``."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    dots: bool = False
    faint: bool = False


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Four figures at most, small ones as powers."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def smooth(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """A centred running mean over ``share`` of the points."""
    half = max(1, round(len(points) * share / 2))
    means = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def line_chart(series: Sequence[Series], x_name: str, y_name: str) -> str:
    """Courses over a common x axis. A single series needs no legend; its name is the chart's heading."""
    points = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    if not points:
        return ""
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    y0, y1 = (max(0.0, y0 - pad) if y0 >= 0 else y0 - pad), y1 + pad
    x1 = x1 if x1 > x0 else x0 + 1

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_name)} over {escape(x_name)}">']
    for tick in ticks(y0, y1):
        _, y = at(x0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(x0, x1, 6):
        x, _ = at(tick, y0)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_name)}</text>')
    for one in series:
        parts.append(_course([at(x, y) for x, y in one.points if math.isfinite(y)], one))
        if one.dots:
            for x, y in one.points:
                cx, cy = at(x, y)
                tip = f"<title>{escape(one.name)}: {number(y)} at {escape(x_name)} {number(x)}</title>"
                parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" class="dot c{one.colour}">{tip}</circle>')
    parts.append("</svg>")
    named = [one for one in series if not one.faint]
    if len(named) > 1:
        keys = "".join(f'<span><i class="key k{one.colour}"></i>{escape(one.name)}</span>' for one in named)
        parts.append(f'<p class="legend">{keys}</p>')
    return "".join(parts)


def _course(points: list[tuple[float, float]], one: Series) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" class="line c{one.colour}{" faint" if one.faint else ""}"/>'


def heat_table(rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float], unit: str) -> str:
    """Values by row and column, as cells shaded from the page's ground to its first colour."""
    largest = max(values.values(), default=0.0) or 1.0
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            value = values.get((row, column))
            if value is None:
                cells.append("<td></td>")
                continue
            share = 100 * value / largest
            tip = escape(f"{row} {column}: {unit} {number(value)}")
            cells.append(f'<td class="cell" style="--share:{share:.0f}%" title="{tip}">{value:.2f}</td>')
        lines.append(f"<tr><th>{escape(row)}</th>{''.join(cells)}</tr>")
    return f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
