"""Files of the reference leaderboard, and its averages.

Leaderboard rules: an unweighted mean over the tasks of each of image, video and visdoc and over all 78; hit@1 for
images and videos, ndcg@5 with linear gain for documents; a missing task counts as 0. Here it is also named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import read_benchmark
from vlm2vec.evaluation.evaluate import groups_of
from vlm2vec.evaluation.metrics import group_means

UPSTREAM_NAMES = {task.name: task for task in read_benchmark("mmeb-v2")[0].tasks}
# The submission's names of the two sets whose page numbers were corrected.
RENAMED = {"ViDoSeek-page-fixed": "ViDoSeek-page", "MMLongBench-page-fixed": "MMLongBench-page"}
DOCUMENT_METRICS = ("ndcg_linear@5", "ndcg@5")


def is_upstream(content: Any) -> bool:
    """Whether this is the content of a leaderboard file."""
    return isinstance(content, Mapping) and isinstance(content.get("metrics"), Mapping) and "metadata" in content


def read_upstream(path: Path) -> dict[str, Any]:
    """A leaderboard file as the content of a `results.json`.

    Tasks that are not part of mmeb-v2 are left out and named under `about`; tasks that the file lacks are named under
    `missing`.

    Raises:
        UserError: for any other file.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not is_upstream(content):
        raise UserError(f"{path}: not a leaderboard file; expected an object with metadata and metrics")
    tasks: dict[str, Any] = {}
    unknown = []
    for modality, scores in content["metrics"].items():
        for name, metrics in scores.items():
            task = UPSTREAM_NAMES.get(RENAMED.get(name, name))
            if task is None:
                unknown.append(name)
            elif isinstance(metrics, Mapping):
                tasks[task.name] = _entry(path, task, modality, metrics)
    ordered = {name: tasks[name] for name in UPSTREAM_NAMES if name in tasks}
    metadata = content["metadata"]
    about = {"file": path.name, "report_date": metadata.get("report_generated_date"), "other_tasks": ", ".join(unknown)}
    facts = {key: metadata.get(key) for key in ("model_size", "model_backbone", "embedding_dimension", "url")}
    # A file that covers only images is a file of mmeb-v1, not one of mmeb-v2 with missing tasks.
    covered = {task["modality"] for task in ordered.values()}
    chosen = [task for task in UPSTREAM_NAMES.values() if task.modality in covered]
    return {
        "model": str(metadata.get("model_name") or path.stem),
        "benchmark": "mmeb-v2" if len(covered) > 1 else "mmeb-v1",
        "tasks": ordered,
        "groups": group_means({name: task["score"] for name, task in ordered.items()}, groups_of(chosen)),
        "missing": [task.name for task in chosen if task.name not in ordered],
        "about": {key: value for key, value in {**about, **facts}.items() if value},
    }


def leaderboard_means(content: Mapping[str, Any]) -> dict[str, float]:
    """Group means as on the leaderboard: a missing task counts as 0.

    Args:
        content: Content of a `results.json` of mmeb-v1 or mmeb-v2, or the result of `read_upstream`.
    """
    table = list(read_benchmark(content["benchmark"])[0].tasks)
    scores = {task.name: content["tasks"].get(task.name, {}).get("score", 0.0) for task in table}
    return group_means(scores, groups_of(table))


def _entry(path: Path, task: Any, modality: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    wanted = DOCUMENT_METRICS if modality == "visdoc" else ("hit@1",)
    score = next((metrics[name] for name in wanted if name in metrics), None)
    if not isinstance(score, int | float):
        raise UserError(f"{path}: {task.name} has no {wanted[0]}")
    return {
        "metric": task.metric,
        "score": float(score),
        "chance": None,
        "num_queries": metrics.get("num_data"),
        "num_candidates": task.num_candidates,
        "meta_task": task.meta_task,
        "split": task.split,
        "modality": task.modality,
        "interval": None,
        "metrics": {name: value for name, value in metrics.items() if "@" in name},
    }
