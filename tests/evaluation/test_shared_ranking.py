"""Ranking at a rerun: each vector is read once, and ranks share the tasks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation.toys import ColourEncoder

from vlm2vec.evaluation import evaluate as evaluation
from vlm2vec.evaluation.benchmark import Benchmark
from vlm2vec.evaluation.evaluate import Share, evaluate
from vlm2vec.retrieval.embedding_cache import CachedRows, EmbeddingCache
from vlm2vec.types import EvalQuery

Toy = tuple[Benchmark, dict[str, list[EvalQuery]]]


def scores(results: list[Any]) -> list[tuple[str, float, dict[str, float]]]:
    return [(result.task.name, result.score, result.metrics) for result in results]


def test_queries_with_candidates_of_their_own_read_each_vector_once(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbeddingCache(tmp_path, {"model": "toy"})
    expected = scores(evaluate(ColourEncoder(), *toy))
    read: list[int] = []
    get = CachedRows.__getitem__

    def counted(rows: CachedRows, places: Any) -> np.ndarray:
        found = get(rows, places)
        read.append(len(found))
        return found

    monkeypatch.setattr(CachedRows, "__getitem__", counted)
    assert scores(evaluate(ColourEncoder(), *toy, cache=cache)) == expected
    assert read == [len(evaluation.distinct_inputs(toy[1][task.name])) for task in toy[0].tasks]
    monkeypatch.setattr(evaluation, "IN_MEMORY", 0)  # tables that do not fit are read per query
    assert scores(evaluate(ColourEncoder(), *toy, cache=cache)) == expected


def test_each_task_is_ranked_by_one_rank_and_rank_0_has_all_results(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[tuple[str, str]] = []
    score_task = evaluation.score_task

    def counted(task: Any, *rest: Any) -> Any:
        ranked.append((threading.current_thread().name, task.name))
        return score_task(task, *rest)

    monkeypatch.setattr(evaluation, "score_task", counted)
    barrier = threading.Barrier(2)
    given: dict[int, Any] = {}
    found: dict[int, Any] = {}

    def wait() -> None:
        barrier.wait(60)

    def run(rank: int) -> None:
        def gather(results: Any) -> list[Any]:
            given[rank] = results
            wait()
            return [given[0], given[1]]

        cache = EmbeddingCache(tmp_path, {"model": "toy"})
        share = Share(rank, 2, wait, gather)
        found[rank] = evaluate(ColourEncoder(), *toy, cache=cache, share=share)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    names = [task.name for task in toy[0].tasks]
    assert sorted(ranked) == [("rank 0", names[0]), ("rank 1", names[1])]
    assert found[1] == [] and scores(found[0]) == scores(evaluate(ColourEncoder(), *toy))
