"""Runs side by side: a row for each task and each group mean, as a terminal table or Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from vlm2vec.evaluation.metrics import GROUPS, group_means


@dataclass(frozen=True)
class ComparisonRow:
    """One task, or one group of tasks, across the runs."""

    name: str
    kind: str
    """The meta-task of a task, or the number of tasks of a group."""
    split: str
    chance: float | None
    scores: tuple[float | None, ...]
    """Score of each run, 0 to 1; None if the run lacks the task."""
    is_group: bool = False
    intervals: tuple[tuple[float, float] | None, ...] = ()
    """Interval of each run's score at 95 %, where the run recorded it; empty for a group."""

    def is_best(self, column: int) -> bool:
        """Whether no run scores higher; False if there is a single run."""
        known = [score for score in self.scores if score is not None]
        return len(self.scores) > 1 and self.scores[column] is not None and self.scores[column] == max(known)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, one column each."""

    names: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    metric: str
    """The metric of all tasks; "score" if tasks have different metrics."""
    notes: tuple[str, ...]
    """Sentences: the tasks on which another run beats the last one, and what cannot be compared."""

    @property
    def table(self) -> Table:
        """A table for the terminal; print `remark` below it."""
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
        """The notes, each on its own line."""
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


def comparison_table(columns: Mapping[str, dict[str, Any]]) -> Comparison:
    """Sets runs side by side.

    Args:
        columns: Contents of `results.json` by run; the notes compare the last run with the others.

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
            intervals=tuple(run["tasks"].get(name, {}).get("interval") for run in runs),
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
    return Comparison(tuple(columns), tuple(rows), shared_metric(facts.values()), tuple(_notes(columns, rows)))


def shared_metric(tasks: Iterable[Mapping[str, Any]]) -> str:
    """The metric of all tasks; "score" if there are several."""
    names = {str(task["metric"]) for task in tasks}
    return names.pop() if len(names) == 1 else "score"


def _notes(columns: Mapping[str, dict[str, Any]], rows: Sequence[ComparisonRow]) -> Iterable[str]:
    *others, last = columns or [""]
    for column, other in enumerate(others):
        tasks = [_against(row, column) for row in rows if not row.is_group and _is_ahead(row, column)]
        means = [_against(row, column) for row in rows if row.is_group and _is_ahead(row, column)]
        if tasks:
            in_means = (
                f"; means on which it is ahead: {', '.join(means)}" if means else "; it is ahead on none of the means"
            )
            yield f"{other} is ahead of {last} on: {', '.join(tasks)}{in_means}."
        else:
            yield f"{other} is ahead of {last} on no task."
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
    """`EmojiT2I (40.2 against 35.1)`, with more decimals if one decimal would hide the difference."""
    ours, last = 100 * (row.scores[column] or 0.0), 100 * (row.scores[-1] or 0.0)
    decimals = 1 if f"{ours:.1f}" != f"{last:.1f}" else 3
    return f"{row.name} ({ours:.{decimals}f} against {last:.{decimals}f})"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], num_left: int) -> str:
    """A table whose first `num_left` columns are text, the others numbers."""
    rule = ["---"] * num_left + ["--:"] * (len(head) - num_left)
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, rule, *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def percent(score: float | None) -> str:
    """A score as percent with one decimal; a dash for None."""
    return "–" if score is None else f"{100 * score:.1f}"
