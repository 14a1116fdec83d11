"""Geometry of line charts as inline SVG, without a plotting library; colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 12, 58
MOST_TICKS = 6
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A curve in the coordinates of the plot."""

    name: str
    points: str
    first: str
    last: str


@dataclass(frozen=True)
class Chart:
    """A line chart; ticks are (position, label)."""

    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    level: tuple[float, str] | None = None
    """Position and label of a horizontal reference line."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    top: int = TOP
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def line_chart(series: Mapping[str, Points], level: tuple[float, str] | None = None) -> Chart | None:
    """Curves over steps, from 0 to the last step.

    Args:
        series: By name, (step, value) in any order; points that are not finite are skipped.
        level: Value and label of a horizontal reference line.

    Returns:
        The chart; None if no series has a finite point.
    """
    finite = {name: sorted(p for p in points if math.isfinite(p[1])) for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return None
    steps = [step for points in finite.values() for step, _ in points]
    values = [value for points in finite.values() for _, value in points] + ([level[0]] if level else [])
    x_values, y_values = ticks(0, max(steps)), ticks(min(values), max(values))

    def x(step: float) -> float:
        return round(LEFT + step / max(x_values[-1], max(steps)) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - y_values[0]) / (y_values[-1] - y_values[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    curves = [
        Curve(name, " ".join(f"{x(s)},{y(v)}" for s, v in points), _short(points[0][1]), _short(points[-1][1]))
        for name, points in finite.items()
    ]
    return Chart(
        curves,
        [(x(value), _tick(value)) for value in x_values],
        [(y(value), _tick(value)) for value in y_values],
        (y(level[0]), level[1]) if level else None,
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the range."""
    span = high - low or max(abs(high), 1.0)
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= MOST_TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _tick(value: float) -> str:
    """Label of a tick: `8e-4` in place of `0.0008`, which is too wide for a phone."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _short(value: float) -> str:
    """Three decimals, fewer for large values; three significant digits for small ones such as a learning rate."""
    if abs(value) < 0.1 and value != 0:
        return f"{value:.3g}"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3}f}"
