"""Drawings of scores as inline SVG: nothing to fetch, nothing to install. Colours come from the page's style sheet."""

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
    """One model in a scatter drawing; `ours` marks a run of the report beside published rows."""

    name: str
    x: float
    y: float
    ours: bool


def grouped_bars(title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Bars of every series side by side in each group.

    Args:
        title: Read by screen readers.
        groups: Below the axis.
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
    parts = [_frame(title), *_percent_axis(y_label)]
    parts += [f'<path class="axis" stroke-dasharray="4 5" d="M{_x(0)} {_y(0)}L{_x(100)} {_y(100)}"/>']
    for tick in range(0, 101, 20):
        parts.append(f'<text x="{_x(tick)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick}</text>')
    placed = [(point, _x(point.x), _y(point.y)) for point in points]
    return "".join([*parts, *_marks(placed, x_label)])


def by_size(title: str, y_label: str, points: Sequence[Point]) -> str:
    """Score against billions of parameters on a logarithmic axis; `Point.x` is the size."""
    sizes = [point.x for point in points]
    low, high = math.log10(min(sizes)) - 0.1, math.log10(max(sizes)) + 0.15
    scale = (WIDTH - LEFT - RIGHT) / (high - low)
    parts = [_frame(title), *_percent_axis(y_label)]
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if low <= math.log10(tick) <= high:
            x = LEFT + (math.log10(tick) - low) * scale
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>')
    placed = [(point, LEFT + (math.log10(point.x) - low) * scale, _y(point.y)) for point in points]
    return "".join([*parts, *_marks(placed, "parameters, billions (logarithmic)")])


def _marks(placed: Sequence[tuple[Point, float, float]], x_label: str) -> list[str]:
    """Dots with names; a name is left out where it would lie on an earlier one (the dot still tells it)."""
    parts, taken = [], list[tuple[float, float, float]]()
    for point, x, y in sorted(placed, key=lambda one: not one[0].ours):
        kind = "ours" if point.ours else "other"
        hint = f"<title>{escape(point.name)}: {point.x:g}, {point.y:.1f}</title>"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if point.ours else 4}">{hint}</circle>')
        length = 6.4 * len(point.name)
        right = x + length + 9 < WIDTH - RIGHT
        begin = x + 9 if right else x - 9 - length
        if all(abs(y - other) > 13 or begin > stop or begin + length < start for start, stop, other in taken):
            taken.append((begin, begin + length, y))
            anchor, place = ("start", x + 9) if right else ("end", x - 9)
            where = f'x="{place:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}"'
            parts.append(f'<text class="{kind}" {where}>{escape(point.name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text></svg>']


def _frame(title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'


def _percent_axis(label: str = "percent") -> list[str]:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(tick)}" y2="{_y(tick)}"/>'
        f'<text x="{LEFT - 8}" y="{_y(tick) + 4}" text-anchor="end">{tick}</text>'
        for tick in range(0, 101, 20)
    ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [*lines, f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(label)}</text>']


def _x(percent: float) -> float:
    return round(LEFT + percent / 100 * (WIDTH - LEFT - RIGHT), 1)


def _y(percent: float) -> float:
    return round(HEIGHT - BOTTOM - percent / 100 * (HEIGHT - TOP - BOTTOM), 1)
