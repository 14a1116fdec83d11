"""A run's curves as one HTML page that needs no network and no tracker."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

CURVES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
    "mean_cosine": "Mean cosine of different inputs",
    "memory_mib": "Memory, MiB",
}
WIDTH, HEIGHT = 640, 160
STYLE = "body{font:15px sans-serif;max-width:720px;margin:2em auto}svg{width:100%;background:#f6f6f6}pre{overflow:auto}"


def write_report(path: Path, title: str, log: Sequence[dict[str, Any]], recipe: str) -> None:
    """Writes beside and renames.

    Args:
        path: The HTML file.
        title: Of the page.
        log: Entries with `step` and any of the curves.
        recipe: As resolved.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    for name, caption in CURVES.items():
        points = [(float(entry["step"]), float(entry[name])) for entry in log if name in entry]
        if points:
            parts.append(f"<h2>{caption}</h2>\n{curve(points)}")
    parts.append(f"<h2>Recipe</h2>\n<pre>{escape(recipe)}</pre>")
    body = "\n".join(parts)
    page = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>\n{body}\n"
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(page)
    beside.replace(path)


def curve(points: Sequence[tuple[float, float]]) -> str:
    """An SVG line through (step, value) with its range written beside it."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    across, up = max(steps) - min(steps) or 1, high - low or 1
    line = " ".join(
        f"{(step - min(steps)) / across * WIDTH:.1f},{HEIGHT - (value - low) / up * HEIGHT:.1f}"
        for step, value in points
    )
    path = f'<polyline fill="none" stroke="#2166ac" stroke-width="1.5" points="{line}"/>'
    about = f"steps {steps[0]:g} to {steps[-1]:g}; from {values[0]:.4g} to {values[-1]:.4g}; {low:.4g} to {high:.4g}"
    return f'<svg viewBox="0 -8 {WIDTH} {HEIGHT + 16}" role="img">{path}</svg><p>{about}</p>'
