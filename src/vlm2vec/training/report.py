"""Writes the report of a run: held-out scores, first loss, curves and recipe as a self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from vlm2vec.charts import Chart, line_chart
from vlm2vec.files import write_text

TEMPLATE = Path(__file__).with_name("templates") / "report.html.j2"
CURVES = {
    "loss": ("Loss", "Contrastive loss at each logged step. "),
    "grad_norm": ("Gradient norm", "Before clipping. "),
    "learning_rate": ("Learning rate", ""),
    "mean_cosine": ("Mean cosine of different inputs", "A value near 1 is an embedding collapse. "),
    "memory_mib": ("Memory", "MiB. "),
}
FAR_ABOVE = 1.5
"""A first loss above this multiple of log(batch size) draws a warning: the loss of equal vectors is log(batch size)."""


@dataclass(frozen=True)
class RunFacts:
    """Content of the report besides the curves.

    Attributes:
        title: Heading of the page.
        lines: Sentences below the heading, such as the model and the date.
        recipe: The resolved recipe.
        batch_size: Pairs per step.
        scores: Held-out score by step, 0 to 1; empty without an evaluation.
        metric: Name of the score, such as "overall".
    """

    title: str
    lines: Sequence[str]
    recipe: str
    batch_size: int
    scores: Mapping[int, float]
    metric: str = "overall"


def write_report(path: Path, facts: RunFacts, log: Sequence[Mapping[str, Any]]) -> None:
    """Writes the page; the file is complete or absent.

    Args:
        path: The HTML file.
        facts: Heading, recipe and held-out scores.
        log: Entries with `step` and any of `CURVES`.
    """
    first = next((float(entry["loss"]) for entry in log if "loss" in entry), None)
    remark, is_warning = _remark(first, facts.batch_size)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=facts.title,
        about=facts.lines,
        numbers=list(_numbers(facts, first, log)),
        remark=remark,
        is_warning=is_warning,
        charts=list(_charts(facts, log)),
        recipe=facts.recipe,
    )
    write_text(path, page)


def _numbers(facts: RunFacts, first: float | None, log: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) for the tiles at the top."""
    if facts.scores:
        start, end = min(facts.scores), max(facts.scores)
        if start != end:
            yield f"Held-out score, step {start}", f"{100 * facts.scores[start]:.1f} %"
        yield f"Held-out score, step {end}", f"{100 * facts.scores[end]:.1f} %"
    if first is not None:
        yield "First loss", f"{first:.3f}"
        yield f"log({facts.batch_size})", f"{math.log(facts.batch_size):.3f}"
        yield "Last loss", f"{next(float(entry['loss']) for entry in reversed(log) if 'loss' in entry):.3f}"


def _remark(first: float | None, batch_size: int) -> tuple[str, bool]:
    """Returns a sentence that compares the first loss with log(batch size), and whether it is a warning."""
    if first is None or batch_size < 2:
        return "", False
    equal = math.log(batch_size)
    text = f"The first logged loss is {first:.3f}; equal vectors have a loss of log({batch_size}) = {equal:.3f}."
    if first > FAR_ABOVE * equal:
        return f"{text} It is far above: the temperature is low for this model; raise train.temperature.", True
    return text, False


def _charts(facts: RunFacts, log: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Chart]]:
    """Yields (caption, sentence below, chart) for each curve that has points."""
    level = (math.log(facts.batch_size), f"log({facts.batch_size})") if facts.batch_size > 1 else None
    for name, (caption, unit) in CURVES.items():
        points = [(float(entry["step"]), float(entry[name])) for entry in log if name in entry and "step" in entry]
        if chart := line_chart({name: points}, level if name == "loss" else None):
            yield caption, unit, chart
        if name == "loss" and (chart := line_chart({"score": [(s, 100 * v) for s, v in facts.scores.items()]})):
            yield "Held-out score", f"{facts.metric}, percent. ", chart
