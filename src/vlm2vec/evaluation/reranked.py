"""Shows the scores after reranking beside those of the embedder alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm2vec.evaluation.comparison import comparison_table, markdown_table, percent


def columns_of(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A run as columns of a comparison: the embedder alone and, if there was a second stage, after reranking.

    Args:
        content: The content of a `results.json`.

    Returns:
        Contents of `results.json` by name; the second one has the scores after reranking as its scores.
    """
    columns = {str(content["model"]): dict(content)}
    tasks = content["tasks"]
    if "reranked_groups" in content:
        name = f"{content['model']} + {next(iter(tasks.values()))['reranked']['model']}"
        scored = {task: {**facts, **facts["reranked"]} for task, facts in tasks.items()}
        columns[name] = {**content, "model": name, "tasks": scored, "groups": content["reranked_groups"]}
    return columns


def reranked_markdown(content: Mapping[str, Any]) -> list[str]:
    """Paragraphs with both scores of each task and group, and time a query; none without a second stage."""
    if "reranked_groups" not in content:
        return []
    tasks = content["tasks"]
    first = next(iter(tasks.values()))["reranked"]
    rows = []
    for row in comparison_table(columns_of(content)).rows:
        reranked = {} if row.is_group else tasks[row.name]["reranked"]
        interval = " to ".join(percent(end) for end in reranked.get("interval", ()))
        seconds = f"{reranked['seconds_per_query']:.2f}" if reranked else ""
        unreadable = str(reranked["num_unreadable"] or "") if reranked else ""
        rows.append((row.name, *map(percent, row.scores), interval, seconds, unreadable))
    head = ("task", "embedder", "reranked", "95 %", "s a query", "unreadable")
    return [
        f"## The first {first['top']} candidates reranked by {first['model']}",
        "Seconds a query are those of reranking alone, measured when each pair was scored. Unreadable: pairs that the "
        "reranker could not read; they rank after the others.",
        markdown_table(head, rows, num_left=1).rstrip(),
    ]
