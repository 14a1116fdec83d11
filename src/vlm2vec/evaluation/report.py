"""What an evaluation leaves behind: results as JSON, Markdown and HTML, and several runs side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vlm2vec.evaluation.benchmark import Benchmark
from vlm2vec.evaluation.evaluate import RESULTS_FILE, TaskResult, results_json
from vlm2vec.evaluation.metrics import GROUPS, group_means
from vlm2vec.evaluation.report_html import percent, render_page

MARKDOWN_FILE = "results.md"
LEADERBOARD_FILE = "leaderboard.json"
HTML_FILE = "report.html"
# The fields of the upstream leaderboard's submission, besides the model's name and the date.
LEADERBOARD_FIELDS = (
    "model_backbone",
    "model_size",
    "embedding_dimension",
    "max_length_tokens",
    "model_release_date",
    "data_source",
    "url",
)


@dataclass(frozen=True)
class ComparisonRow:
    """One task, or one group of tasks, across the runs."""

    name: str
    kind: str
    """Meta-task of a task; how many tasks a group has."""
    split: str
    chance: float | None
    scores: tuple[float | None, ...]
    """Score of each run, 0 to 1; None where the run has no such task."""
    is_group: bool = False

    def is_best(self, column: int) -> bool:
        """Whether no other run is better; never where there is only one run."""
        known = [score for score in self.scores if score is not None]
        return len(self.scores) > 1 and self.scores[column] is not None and self.scores[column] == max(known)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, one column each."""

    names: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    metric: str
    """Of every task; "score" where tasks have several."""
    notes: tuple[str, ...]
    """Plain sentences: where another run is ahead of the last one, and what cannot be compared."""

    @property
    def table(self) -> Table:
        """For the terminal; print `remark` below it."""
        table = Table(title=f"{self.metric} in percent")
        for heading in ("task", "meta-task", "ind/ood"):
            table.add_column(heading)
        for heading in ("chance", *self.names):
            table.add_column(Text(heading), justify="right")
        previous: ComparisonRow | None = None
        for row in self.rows:
            if previous and row.is_group and not previous.is_group:
                table.add_section()
            cells = [Text(percent(s), style="bold" if row.is_best(i) else "") for i, s in enumerate(row.scores)]
            table.add_row(Text(row.name), Text(row.kind), row.split, percent(row.chance), *cells)
            previous = row
        return table

    @property
    def remark(self) -> str:
        """The notes, one a line."""
        return "\n".join(self.notes)

    @property
    def markdown(self) -> str:
        """The table and its notes."""
        head = ("task", "meta-task", "ind/ood", "chance", *self.names)
        rows = [
            (
                row.name,
                row.kind,
                row.split,
                percent(row.chance),
                *(f"**{percent(s)}**" if row.is_best(i) else percent(s) for i, s in enumerate(row.scores)),
            )
            for row in self.rows
        ]
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return f"{markdown_table(head, rows, num_left=3)}{notes}"


def write_evaluation(
    output: Path,
    model: str,
    benchmark: Benchmark,
    results: list[TaskResult],
    about: dict[str, Any],
    run: dict[str, Any] | None = None,
) -> None:
    """Writes `results.json`, `results.md`, `leaderboard.json` and `report.html`.

    Each file is whole or absent. The page comes last: it decodes pictures, which may have gone since.

    Args:
        output: The folder, made if absent.
        model: What was evaluated, as the user named it.
        benchmark: The tasks' facts.
        results: One a task.
        about: What the numbers depend on: template, precision, versions, data revision; goes into `results.json`.
        run: What differs from run to run: time, machine.

    Raises:
        UserError: if a sample's picture can no longer be read.
    """
    output.mkdir(parents=True, exist_ok=True)
    content = results_json(model, benchmark, results, about)
    facts = {**about, **(run or {})}
    write_text(output / RESULTS_FILE, _json(content))
    write_text(output / MARKDOWN_FILE, _results_markdown(content, facts))
    write_text(output / LEADERBOARD_FILE, _json(leaderboard_json(content)))
    title = f"{model} on {benchmark.name}"
    write_html(output / HTML_FILE, title, {model: content}, results, {}, facts)


def write_html(
    path: Path,
    title: str,
    columns: Mapping[str, dict[str, Any]],
    results_of_last: list[TaskResult],
    loss_curves: Mapping[str, list[dict[str, Any]]],
    about: dict[str, Any],
) -> None:
    """Writes a report as one self-contained HTML file.

    Args:
        path: The file; its folder is made if absent.
        title: Heading of the page.
        columns: Contents of `results.json` by run.
        results_of_last: Task results of the last run, whose samples are shown.
        loss_curves: By run, the training log's entries with `step` and `loss`; others are passed over.
        about: Facts for the foot of the page.

    Raises:
        UserError: if a sample's picture cannot be read.
    """
    page = render_page(title, comparison_table(columns), results_of_last, loss_curves, _facts(about))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def comparison_table(columns: Mapping[str, dict[str, Any]]) -> Comparison:
    """Sets runs side by side.

    Args:
        columns: Contents of `results.json` by run; the notes compare the others with the last one.

    Returns:
        Rows for each task, then for each group; `.table` and `.remark` for a terminal, `.markdown` for a file.
    """
    runs = list(columns.values())
    facts: dict[str, dict[str, Any]] = {}
    for run in reversed(runs):
        facts = {**run["tasks"], **facts}
    rows = [
        ComparisonRow(
            name,
            fact["meta_task"],
            fact["split"] or "",
            fact["chance"],
            tuple(run["tasks"].get(name, {}).get("score") for run in runs),
        )
        for name, fact in facts.items()
    ]
    several = len({fact.get("modality") for fact in facts.values()}) > 1
    of_group = {
        name: tuple(
            group
            for group in (fact["meta_task"], fact.get("modality") if several else None, fact["split"])
            if group is not None
        )
        for name, fact in facts.items()
    }
    chances = group_means({name: fact["chance"] for name, fact in facts.items()}, of_group)
    for group in (group for group in GROUPS if group in chances):
        num_tasks = sum(group in (*groups, "overall") for groups in of_group.values())
        kind = f"mean of {num_tasks}"
        scores = tuple(run["groups"].get(group) for run in runs)
        rows.append(ComparisonRow(group, kind, "", chances[group], scores, is_group=True))
    return Comparison(tuple(columns), tuple(rows), _metric(facts.values()), tuple(_notes(columns, rows)))


def _metric(tasks: Iterable[Mapping[str, Any]]) -> str:
    """The metric of all tasks, "score" where there are several."""
    names = {str(task["metric"]) for task in tasks}
    return names.pop() if len(names) == 1 else "score"


def _notes(columns: Mapping[str, dict[str, Any]], rows: Sequence[ComparisonRow]) -> Iterable[str]:
    *others, last = columns or [""]
    for column, other in enumerate(others):
        tasks = [_against(row, column) for row in rows if not row.is_group and _is_ahead(row, column)]
        means = [_against(row, column) for row in rows if row.is_group and _is_ahead(row, column)]
        if tasks:
            in_means = f"; of the means, on: {', '.join(means)}" if means else "; of the means, on none"
            yield f"{other} is ahead of {last} on: {', '.join(tasks)}{in_means}."
        else:
            yield f"{other} is nowhere ahead of {last}."
    shapes = [
        {(name, task["num_queries"], task["num_candidates"]) for name, task in run["tasks"].items()}
        for run in columns.values()
    ]
    if any(shape != shapes[0] for shape in shapes):
        yield "The runs differ in their tasks, queries or candidates: their means cannot be compared."


def _is_ahead(row: ComparisonRow, column: int) -> bool:
    score, last = row.scores[column], row.scores[-1]
    return score is not None and last is not None and score > last


def _against(row: ComparisonRow, column: int) -> str:
    """`EmojiT2I (40.2 against 35.1)`, with another decimal where one would hide the difference."""
    ours, last = 100 * (row.scores[column] or 0.0), 100 * (row.scores[-1] or 0.0)
    decimals = 1 if f"{ours:.1f}" != f"{last:.1f}" else 3
    return f"{row.name} ({ours:.{decimals}f} against {last:.{decimals}f})"


def _results_markdown(content: dict[str, Any], about: dict[str, Any]) -> str:
    metric = _metric(content["tasks"].values())
    tasks = [
        (
            name,
            task["meta_task"],
            task["split"] or "",
            str(task["num_queries"]),
            str(task["num_candidates"]),
            percent(task["chance"]),
            percent(task["score"]),
            " to ".join(percent(end) for end in task.get("interval") or ()),
            *([task["metric"]] if metric == "score" else []),
        )
        for name, task in content["tasks"].items()
    ]
    head = ["task", "meta-task", "ind/ood", "queries", "candidates", "chance", metric, "95 %"]
    head += ["metric"] if metric == "score" else []
    groups = [(row.name, row.kind, percent(row.chance), percent(row.scores[0])) for row in _group_rows(content)]
    parts = [
        f"# {content['model']} on {content['benchmark']}",
        f"{metric} in percent; a gold that ties with another candidate counts as a miss. 95 %: bootstrap over queries.",
        markdown_table(head, tasks, num_left=3).rstrip(),
        "Unweighted means over tasks:",
        markdown_table(("group", "tasks", "chance", metric), groups, num_left=2).rstrip(),
    ]
    facts = "\n".join(f"- {name}: {value}" for name, value in _facts(about))
    return "\n\n".join([*parts, facts] if facts else parts) + "\n"


def _group_rows(content: dict[str, Any]) -> list[ComparisonRow]:
    return [row for row in comparison_table({content["model"]: content}).rows if row.is_group]


def leaderboard_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """The upstream submission from a `results.json`; metadata that it does not know stay null for the submitter."""
    about = content.get("about", {})
    metadata = {"model_name": content["model"], **{name: about.get(name) for name in LEADERBOARD_FIELDS}}
    metadata["report_generated_date"] = datetime.now(UTC).replace(tzinfo=None).isoformat()
    metrics: dict[str, dict[str, Any]] = {}
    for name, task in content["tasks"].items():
        scores = task.get("metrics") or {task["metric"]: task["score"]}
        sizes = {"num_pred": task["num_queries"], "num_data": task["num_queries"]}
        metrics.setdefault(task.get("modality", "image"), {})[name] = {**scores, **sizes}
    return {"metadata": metadata, "metrics": metrics}


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as people read them; what is unknown is left out."""
    facts = []
    for name, value in about.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if value is not None and value != "":
            facts.append((name.replace("_", " "), str(value)))
    return facts


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], num_left: int) -> str:
    """A table whose first `num_left` columns are text, the others numbers."""
    rule = ["---"] * num_left + ["--:"] * (len(head) - num_left)
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, rule, *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that no reader meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
