"""Encode every distinct input once, rank each query's own candidates, score. Knows models only as an `Encoder`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.data.readers import read_eval_set
from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark, EvalTask
from vlm2vec.evaluation.metrics import group_means, hit_at
from vlm2vec.images import ImageRef
from vlm2vec.retrieval.rank import gold_rank, top_k
from vlm2vec.types import EmbeddingInput, Encoder, EvalQuery

RESULTS_FILE = "results.json"
SAMPLES_PER_TASK = 5
PART = 512


@dataclass(frozen=True)
class Sample:
    """One query of a task with its best candidates, for people to look at."""

    query: EmbeddingInput
    gold: EmbeddingInput
    top: tuple[tuple[EmbeddingInput, float, bool], ...]
    """(candidate, cosine, is it relevant), best first."""


@dataclass
class TaskResult:
    """Scores of one task."""

    task: EvalTask
    score: float
    chance: float
    """Expected score of a random ranking: mean of relevant / candidates."""
    num_queries: int
    num_candidates: int
    """The most candidates that a query of the task has."""
    seconds: float
    samples: list[Sample] = field(default_factory=list)


def read_tasks(benchmark: Benchmark, folder: Path) -> dict[str, list[EvalQuery]]:
    """Queries of every task; counts that the benchmark states must be there.

    Raises:
        UserError: for a set that cannot be read or is not of the stated size.
    """
    tasks = {}
    for task in benchmark.tasks:
        queries = tasks[task.name] = read_eval_set(folder, task.name)
        most = max(len(query.candidates) for query in queries)
        for what, stated, found in (
            ("num_queries", task.num_queries, len(queries)),
            ("num_candidates", task.num_candidates, most),
        ):
            if stated is not None and stated != found:
                raise UserError(f"{folder / task.name}: {what} is {found}, but {benchmark.name} states {stated}")
    return tasks


def pictures_of(tasks: dict[str, list[EvalQuery]]) -> Iterable[ImageRef]:
    """Every picture of these tasks, repeats included."""
    for queries in tasks.values():
        for query in queries:
            for item in (query.query, *query.candidates):
                yield from item.images


def evaluate(
    encoder: Encoder,
    benchmark: Benchmark,
    tasks: dict[str, list[EvalQuery]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[TaskResult]:
    """Scores an encoder on every task.

    Args:
        encoder: Anything with `encode`.
        benchmark: The tasks' facts.
        tasks: Their queries, from `read_tasks`.
        progress: Called with the number of distinct inputs encoded since the last call.

    Returns:
        One result a task, in the benchmark's order.
    """
    vectors: dict[EmbeddingInput, np.ndarray] = {}
    results = []
    for task in benchmark.tasks:
        since = time.perf_counter()
        queries = tasks[task.name]
        new = [item for item in distinct_inputs(queries) if item not in vectors]
        for start in range(0, len(new), PART):
            part = new[start : start + PART]
            vectors.update(zip(part, encoder.encode(part), strict=True))
            progress(len(part))
        results.append(_score(task, queries, vectors, since))
    return results


def distinct_inputs(queries: Iterable[EvalQuery]) -> list[EmbeddingInput]:
    """Queries and candidates without repeats, in order."""
    return list(dict.fromkeys(item for query in queries for item in (query.query, *query.candidates)))


def num_distinct(tasks: dict[str, list[EvalQuery]]) -> int:
    """How many inputs `evaluate` will encode."""
    return len(distinct_inputs(query for queries in tasks.values() for query in queries))


def _score(
    task: EvalTask, queries: list[EvalQuery], vectors: dict[EmbeddingInput, np.ndarray], since: float
) -> TaskResult:
    row = {item: i for i, item in enumerate(distinct_inputs(queries))}
    matrix = np.stack([vectors[item] for item in row])
    ranks, samples = [], []
    shown = {round(i * (len(queries) - 1) / (SAMPLES_PER_TASK - 1)) for i in range(SAMPLES_PER_TASK)}
    for i, query in enumerate(queries):
        scores = matrix[[row[item] for item in query.candidates]] @ matrix[row[query.query]]
        ranks.append(gold_rank(scores, query.relevant))
        if i in shown:
            best = top_k(scores, 5)
            top = tuple((query.candidates[c], float(scores[c]), int(c) in query.relevant) for c in best)
            samples.append(Sample(query.query, query.candidates[query.relevant[0]], top))
    return TaskResult(
        task,
        hit_at(ranks, 1),
        float(np.mean([len(query.relevant) / len(query.candidates) for query in queries])),
        len(queries),
        max(len(query.candidates) for query in queries),
        time.perf_counter() - since,
        samples,
    )


def results_json(model: str, benchmark: Benchmark, results: list[TaskResult]) -> dict[str, Any]:
    """The content of `results.json`: scores 0 to 1, group scores as unweighted means over tasks."""
    return {
        "model": model,
        "benchmark": benchmark.name,
        "tasks": {
            result.task.name: {
                "metric": result.task.metric,
                "score": result.score,
                "chance": result.chance,
                "num_queries": result.num_queries,
                "num_candidates": result.num_candidates,
                "meta_task": result.task.meta_task,
                "split": result.task.split,
            }
            for result in results
        },
        "groups": group_means(
            {result.task.name: result.score for result in results},
            {result.task.name: (result.task.meta_task, result.task.split) for result in results},
        ),
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Reads `results.json` of an evaluation.

    Raises:
        UserError: if there is none.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; run `vlm2vec eval` with --output {folder} first")
    content: dict[str, Any] = json.loads(path.read_text())
    return content
