"""Plots of scores as inline SVG, without a plotting library. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 14, 58
NUM_COLOURS = 6


@dataclass(frozen=True)
class Point:
    """One model in a scatter plot; `ours` marks a run of the report among published scores."""

    name: str
    x: float
    y: float
    ours: bool


def grouped_bars(title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Bars of every series side by side in each group.

    Args:
        title: For screen readers.
        groups: Labels below the axis.
        series: (name, score of each group in percent; None leaves a gap).
    """
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    bar = min(slot * 0.8 / max(len(series), 1), 34)
    parts = [_frame(title), *_percent_axis()]
    for g, group in enumerate(groups):
        middle = LEFT + slot * (g + 0.5)
        label = escape(group.replace("_", " "))
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>')
        for s, (name, values) in enumerate(series):
            value = values[g]
            if value is None:
                continue
            x, top = middle + (s - len(series) / 2) * bar, _y(value)
            hint = f"<title>{escape(name)}, {escape(group)}: {value:.1f}</title>"
            parts.append(
                f'<rect class="fill-{s % NUM_COLOURS + 1}" x="{x + 1:.1f}" y="{top:.1f}" width="{bar - 2:.1f}" '
                f'height="{HEIGHT - BOTTOM - top:.1f}">{hint}</rect>'
            )
            if bar >= 24:
                place = f'x="{x + bar / 2:.1f}" y="{top - 4:.1f}"'
                parts.append(f'<text class="value" {place} text-anchor="middle">{value:.1f}</text>')
    return "".join([*parts, "</svg>"])


def against(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """One score against another, both in percent, with the line on which they are equal."""
    low, high = _range([point.x for point in points] + [point.y for point in points])
    across = (WIDTH - LEFT - RIGHT) / (high - low)
    parts = [_frame(title), *_percent_axis(y_label, low, high)]
    ends = f"M{LEFT} {_y(low, low, high)}L{WIDTH - RIGHT} {_y(high, low, high)}"
    parts.append(f'<path class="axis" stroke-dasharray="4 5" d="{ends}"/>')
    for tick in range(low, high + 1, 10):
        x = LEFT + (tick - low) * across
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick}</text>')
    placed = [(point, LEFT + (point.x - low) * across, _y(point.y, low, high)) for point in points]
    return "".join([*parts, *_marks(placed, x_label)])


def by_size(title: str, y_label: str, points: Sequence[Point]) -> str:
    """Score against billions of parameters on a logarithmic axis; `Point.x` is the size."""
    low, high = _range([point.y for point in points])
    sizes = [point.x for point in points]
    left, right = math.log10(min(sizes)) - 0.1, math.log10(max(sizes)) + 0.25
    scale = (WIDTH - LEFT - RIGHT) / (right - left)
    parts = [_frame(title), *_percent_axis(y_label, low, high)]
    for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if left <= math.log10(tick) <= right:
            x = LEFT + (math.log10(tick) - left) * scale
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>')
    placed = [(point, LEFT + (math.log10(point.x) - left) * scale, _y(point.y, low, high)) for point in points]
    return "".join([*parts, *_marks(placed, "parameters, billions (logarithmic)")])


def _marks(placed: Sequence[tuple[Point, float, float]], x_label: str) -> list[str]:
    """Dots with names; a name that would overlap a dot or another name is left out (hovering over the dot shows it)."""
    parts, taken = [], [(x - 5, x + 5, y) for _, x, y in placed]
    for point, x, y in sorted(placed, key=lambda one: not one[0].ours):
        kind = "ours" if point.ours else "other"
        hint = f"<title>{escape(point.name)}: {point.x:g}, {point.y:.1f}</title>"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if point.ours else 4}">{hint}</circle>')
        length = (7.2 if point.ours else 6.4) * len(point.name)
        for anchor, place, begin in (("start", x + 9, x + 9), ("end", x - 9, x - 9 - length)):
            inside = begin > LEFT and begin + length < WIDTH - RIGHT
            if inside and all(
                abs(y - other) > 12 or begin > stop or begin + length < start for start, stop, other in taken
            ):
                taken.append((begin, begin + length, y))
                where = f'x="{place:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}"'
                parts.append(f'<text class="{kind}" {where}>{escape(point.name)}</text>')
                break
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text></svg>']


def _frame(title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'


def _range(values: Sequence[float]) -> tuple[int, int]:
    """Multiples of ten that enclose the values, at least one point away from them."""
    low, high = math.floor((min(values) - 1) / 10) * 10, math.ceil((max(values) + 1) / 10) * 10
    return max(low, 0), min(high, 100)


def _percent_axis(label: str = "percent", low: int = 0, high: int = 100) -> list[str]:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(tick, low, high)}" y2="{_y(tick, low, high)}"/>'
        f'<text x="{LEFT - 8}" y="{_y(tick, low, high) + 4}" text-anchor="end">{tick}</text>'
        for tick in range(low, high + 1, 20 if high - low > 60 else 10)
    ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [*lines, f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(label)}</text>']


def _y(percent: float, low: int = 0, high: int = 100) -> float:
    return round(HEIGHT - BOTTOM - (percent - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)
