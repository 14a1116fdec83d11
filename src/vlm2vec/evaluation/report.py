"""The files of an evaluation: results as JSON, Markdown and HTML, and several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from vlm2vec.evaluation.benchmark import Benchmark
from vlm2vec.evaluation.comparison import ComparisonRow, comparison_table, markdown_table, percent, shared_metric
from vlm2vec.evaluation.evaluate import RESULTS_FILE, TaskResult, results_json
from vlm2vec.evaluation.report_html import render_page
from vlm2vec.evaluation.reranked import columns_of, reranked_markdown
from vlm2vec.files import write_json, write_text

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


def write_evaluation(
    output: Path,
    model: str,
    benchmark: Benchmark,
    results: list[TaskResult],
    about: dict[str, Any],
    run: dict[str, Any] | None = None,
) -> None:
    """Writes `results.json`, `results.md`, `leaderboard.json` and `report.html`.

    Each file is complete or absent. The page is written last, because it decodes images, which may have been removed.

    Args:
        output: The folder; created if missing.
        model: The evaluated model, as the user named it.
        benchmark: The tasks' facts.
        results: One for each task.
        about: What the scores depend on: template, precision, versions, data revision. Saved in `results.json`.
        run: What differs between runs of the same evaluation: time, machine.

    Raises:
        UserError: if a sample's image can no longer be read.
    """
    content = results_json(model, benchmark, results, about)
    facts = {**about, **(run or {})}
    write_json(output / RESULTS_FILE, content)
    write_text(output / MARKDOWN_FILE, _results_markdown(content, facts))
    write_json(output / LEADERBOARD_FILE, leaderboard_json(content))
    title = f"{Path(model).name} on {benchmark.name}"
    write_html(output / HTML_FILE, title, columns_of(content), results, {}, facts, opening_of(model))


def write_html(
    path: Path,
    title: str,
    columns: Mapping[str, dict[str, Any]],
    results_of_last: list[TaskResult],
    loss_curves: Mapping[str, list[dict[str, Any]]],
    about: dict[str, Any],
    opening: Sequence[str] = (),
) -> None:
    """Writes a report as one self-contained HTML file.

    Args:
        path: The file; its folder is created if missing.
        title: Heading of the page.
        columns: Contents of `results.json` by run.
        results_of_last: Task results of the last run, whose samples are shown.
        loss_curves: By run, the training log's entries with `step` and `loss`; entries without both are skipped.
        about: Facts for the end of the page.
        opening: Sentences below the heading: model, recipe, date.

    Raises:
        UserError: if a sample's image cannot be read.
    """
    table = comparison_table(columns)
    write_text(path, render_page(title, table, results_of_last, loss_curves, _facts(about), opening, path.parent))


def opening_of(model: str) -> list[str]:
    """Model, recipe and date; the recipe is that of the run, if the model is a folder that `vlm2vec train` wrote."""
    lines = [f"Model {model}. Evaluated {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."]
    saved = Path(model) / "recipe.yaml"
    if saved.is_file():
        recipe = yaml.safe_load(saved.read_text())
        train, lora = recipe.get("train", {}), recipe.get("lora")
        tuning = f"LoRA of rank {lora['rank']}" if lora else "no LoRA"
        base, steps, pairs = recipe["model"]["base"], train.get("steps"), train.get("batch_size")
        lines.append(f"Recipe {saved}: {base}, {tuning}, {steps} steps of {pairs} pairs.")
    return lines


def _results_markdown(content: dict[str, Any], about: dict[str, Any]) -> str:
    metric = shared_metric(content["tasks"].values())
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
        f"{metric} in percent; a gold that ties with another candidate is a miss. 95 %: interval over queries, "
        "Wilson's for hits, else by bootstrap.",
        markdown_table(head, tasks, num_left=3).rstrip(),
        "Unweighted means over tasks:",
        markdown_table(("group", "tasks", "chance", metric), groups, num_left=2).rstrip(),
        *reranked_markdown(content),
    ]
    facts = "\n".join(f"- {name}: {value}" for name, value in _facts(about))
    return "\n\n".join([*parts, facts] if facts else parts) + "\n"


def _group_rows(content: dict[str, Any]) -> list[ComparisonRow]:
    return [row for row in comparison_table({content["model"]: content}).rows if row.is_group]


def leaderboard_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """The upstream submission from a `results.json`; unknown metadata stays null for the submitter to fill in."""
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
    """Names and values for display; unknown values are left out."""
    facts = []
    for name, value in about.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if value is not None and value != "":
            facts.append((name.replace("_", " "), str(value)))
    return facts
