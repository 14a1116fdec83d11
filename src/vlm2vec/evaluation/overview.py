"""`vlm2vec report`: runs, leaderboard files and published scores, as Markdown, CSV, HTML and leaderboard files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import read_benchmark, shipped_benchmarks
from vlm2vec.evaluation.comparison import markdown_table
from vlm2vec.evaluation.evaluate import RESULTS_FILE
from vlm2vec.evaluation.metrics import GROUPS, MODALITIES, SPLITS
from vlm2vec.evaluation.plots import NUM_COLOURS, Point, against, by_size, grouped_bars
from vlm2vec.evaluation.report import leaderboard_json
from vlm2vec.evaluation.upstream import is_upstream, leaderboard_means, read_upstream
from vlm2vec.files import write_json, write_text

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")
TEMPLATE = Path(__file__).with_name("templates") / "overview.html.j2"
SOURCES = {
    "P1": "arXiv 2410.05160, table 2",
    "P2": "arXiv 2507.04590, table 2",
    "LB": "the first MMEB leaderboard, self-reported",
    "SC": "means of the reference repository's score file of June 2025",
    "Q3": "the Qwen3-VL-Embedding card",
    "WE": "arXiv 2608.24053, table 1: the leaderboard of 2026-08-24",
    "W3": "arXiv 2608.24053, table 2: tasks that a model does not support count as 0",
    "OV": "arXiv 2609.25165 (Ovis-VL-Embedding)",
    "PR": "collected from public reports in November 2026, the table of each not recorded",
    "run": "this report's run",
    "file": "a leaderboard file, its means computed here",
}


@dataclass(frozen=True)
class Row:
    """One model's group means in percent."""

    model: str
    source: str
    scores: dict[str, float | None]
    missing: tuple[str, ...] = ()
    """Tasks without a score; no mean includes them."""
    size: float | None = None
    """Billions of parameters."""

    @property
    def ours(self) -> bool:
        """Whether the row is one of the runs of this report."""
        return self.source in ("run", "file")


@dataclass(frozen=True)
class Overview:
    """The content of a report."""

    benchmark: str
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    tasks: tuple[tuple[str, str, tuple[float | None, ...]], ...]
    """(name, meta-task, percent of each run) for every task of a run or of the benchmark."""
    about: tuple[tuple[str, dict[str, str]], ...]
    """Facts by run: template hash, resolution, frames, versions, data revision."""
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[Row, ...]:
        """The rows of this report's runs."""
        return tuple(row for row in self.rows if row.ours)


def read_run(path: Path) -> dict[str, Any]:
    """A run's folder, its `results.json`, or an upstream leaderboard file, as the content of a `results.json`.

    Raises:
        UserError: for any other file.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file() and (path / "eval" / RESULTS_FILE).is_file():
        file = path / "eval" / RESULTS_FILE
    if not file.is_file():
        raise UserError(
            f"{path}: no {RESULTS_FILE} there; expected an output folder of `vlm2vec eval`, or a leaderboard file"
        )
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if is_upstream(content):
        return read_upstream(file)
    if not isinstance(content, dict) or not {"model", "benchmark", "tasks", "groups"} <= set(content):
        raise UserError(f"{file}: expected model, benchmark, tasks and groups, or a leaderboard's metadata and metrics")
    return content


def published_rows(benchmark: str) -> list[Row]:
    """The published scores of a benchmark, as shipped."""
    table = yaml.safe_load(PUBLISHED_FILE.read_text())
    columns = table["columns"].get(benchmark, [])
    return [
        Row(row["model"], row["source"], dict(zip(columns, row["scores"], strict=True)), (), row.get("size"))
        for row in table["rows"]
        if row["benchmark"] == benchmark
    ]


def overview(runs: Sequence[Mapping[str, Any]]) -> Overview:
    """Compares runs of a benchmark with each other and with the published scores.

    Raises:
        UserError: if the runs are of different benchmarks.
    """
    names = {str(run["benchmark"]) for run in runs}
    if names == {"mmeb-v1", "mmeb-v2"}:  # the first is part of the second
        names = {"mmeb-v2"}
    if len(names) != 1:
        raise UserError(f"runs of different benchmarks ({', '.join(sorted(names))}): make one report for each")
    benchmark = names.pop()
    expected = _expected(benchmark, runs)
    rows = [_row(run, expected) for run in runs]
    known = published_rows(benchmark)
    found = {group for row in (*rows, *known) for group in row.scores}
    groups = tuple(group for group in GROUPS if group in found)
    tasks = [
        (name, meta, tuple(_percent(run["tasks"].get(name, {}).get("score")) for run in runs))
        for name, meta in expected.items()
    ]
    facts = tuple((str(run["model"]), _facts(run.get("about", {}))) for run in runs)
    return Overview(benchmark, groups, (*known, *rows), tuple(tasks), facts, tuple(_notes(rows, runs, benchmark)))


def write_overview(output: Path, runs: Sequence[Mapping[str, Any]]) -> Overview:
    """Writes `report.md`, `report.csv`, `report.html` and, for each run, `leaderboard-<model>.json`."""
    seen = overview(runs)
    write_text(output / "report.md", as_markdown(seen))
    write_text(output / "report.csv", as_csv(seen))
    write_text(output / "report.html", as_html(seen))
    for run in runs:
        name = "".join(c if c.isalnum() or c in "-._" else "-" for c in str(run["model"])).strip("-.")
        write_json(output / f"leaderboard-{name}.json", leaderboard_json(run))
    return seen


def as_markdown(seen: Overview) -> str:
    """The report as one Markdown page."""
    head = ("model", "from", *(group.replace("_", " ") for group in seen.groups), "missing")
    rows = [
        (row.model, row.source, *(_shown(row.scores.get(group)) for group in seen.groups), str(len(row.missing) or ""))
        for row in seen.rows
    ]
    tasks = [(name, meta, *map(_shown, scores)) for name, meta, scores in seen.tasks]
    parts = [
        f"# {seen.benchmark}",
        "Scores in percent; unweighted means over tasks. Tasks without a score are missing, and no mean includes them.",
        markdown_table(head, rows, num_left=2).rstrip(),
        "\n".join(f"- {key}: {text}" for key, text in SOURCES.items() if any(row.source == key for row in seen.rows)),
        *seen.notes,
        markdown_table(("task", "meta-task", *(row.model for row in seen.runs)), tasks, num_left=2).rstrip(),
    ]
    for model, facts in seen.about:
        parts.append("\n".join([f"About {model}:", "", *(f"- {name}: {value}" for name, value in facts.items())]))
    return "\n\n".join(part for part in parts if part) + "\n"


def as_csv(seen: Overview) -> str:
    """A line for each model and group, then for each run and task; an empty cell if there is no score."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("benchmark", "model", "source", "kind", "name", "score"))
    for row in seen.rows:
        for group in seen.groups:
            writer.writerow((seen.benchmark, row.model, row.source, "group", group, _plain(row.scores.get(group))))
    for name, _, scores in seen.tasks:
        for row, score in zip(seen.runs, scores, strict=True):
            writer.writerow((seen.benchmark, row.model, row.source, "task", name, _plain(score)))
    return stream.getvalue()


def as_html(seen: Overview) -> str:
    """One self-contained page with plots."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["shown"] = _shown
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        seen=seen, sources=SOURCES, plots=_plots(seen), num_colours=NUM_COLOURS
    )


def _plots(seen: Overview) -> dict[str, str]:
    """SVG by heading; a plot without data is left out."""
    plots = {}
    meta = [group for group in seen.groups if group not in (*SPLITS, *MODALITIES, "overall")]
    shown = seen.runs[:NUM_COLOURS]
    if meta and shown:
        series = [(row.model, [row.scores.get(group) for group in meta]) for row in shown]
        plots["Scores by meta-task"] = grouped_bars("Scores by meta-task", meta, series)
    both = [
        Point(row.model, row.scores["ind"] or 0, row.scores["ood"] or 0, row.ours)
        for row in seen.rows
        if row.scores.get("ind") is not None and row.scores.get("ood") is not None
    ]
    if both:
        title = "In distribution against out of distribution"
        plots[title] = against(title, "in distribution, percent", "out of distribution, percent", both)
    sized = [
        Point(row.model, row.size, row.scores["overall"] or 0, row.ours)
        for row in seen.rows
        if row.size and row.scores.get("overall") is not None
    ]
    if sized:
        plots["Score against model size"] = by_size("Overall score against model size", "overall, percent", sized)
    return plots


def _expected(benchmark: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Meta-task by task: those of the shipped benchmark, else those of any run."""
    if benchmark in shipped_benchmarks():
        return {task.name: str(task.meta_task) for task in read_benchmark(benchmark)[0].tasks}
    return {name: str(task["meta_task"]) for run in runs for name, task in run["tasks"].items()}


def _row(run: Mapping[str, Any], expected: Mapping[str, str]) -> Row:
    missing = tuple(name for name in expected if name not in run["tasks"])
    scores = {group: _percent(score) for group, score in run["groups"].items()}
    about = run.get("about", {})
    size = about.get("num_parameters")
    return Row(
        str(run["model"]),
        "file" if "file" in about else "run",
        scores,
        missing,
        float(size) / 1e9 if size else _billions(about.get("model_size")),
    )


def _billions(text: Any) -> float | None:
    """`2.21B`, `2210` (millions are not guessed) or a number of billions."""
    try:
        return float(str(text).strip().removesuffix("B"))
    except ValueError:
        return None


def _notes(rows: Sequence[Row], runs: Sequence[Mapping[str, Any]], benchmark: str) -> list[str]:
    notes = []
    for row, run in zip(rows, runs, strict=True):
        if not row.missing:
            continue
        names = ", ".join(row.missing[:6]) + (f" and {len(row.missing) - 6} more" if len(row.missing) > 6 else "")
        note = f"{row.model} has no score on {len(row.missing)} tasks ({names}): its means cover the other tasks."
        if benchmark in shipped_benchmarks():
            overall = 100 * leaderboard_means({**run, "benchmark": benchmark})["overall"]
            note += f" Counted as 0, as on the leaderboard, its overall score is {overall:.1f}."
        notes.append(note)
    return notes


def _facts(about: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): str(value) for name, value in about.items() if value not in (None, "")}


def _percent(score: float | None) -> float | None:
    return None if score is None else 100 * score


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{score:.1f}"


def _plain(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"
