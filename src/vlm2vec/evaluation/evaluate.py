"""Evaluation of an `Encoder` on a benchmark: every distinct input is encoded once, and every task is scored."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark, EvalTask
from vlm2vec.evaluation.metrics import group_means
from vlm2vec.evaluation.score import Reranked, Sample, TaskResult, score_task
from vlm2vec.evaluation.second_stage import SecondStage
from vlm2vec.evaluation.tasks import TaskReader
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.embedding_cache import CachedRows, InputKeys, MemoryCache, VectorCache, fill
from vlm2vec.types import EmbeddingInput, Encoder, EvalQuery

__all__ = ["Sample", "TaskReader", "TaskResult", "evaluate", "read_results", "read_tasks", "results_json"]

RESULTS_FILE = "results.json"
PART = 512
READ_AT_ONCE = 8192
IN_MEMORY = 512 << 20  # bytes of a task's vectors that are read once; larger tasks are read per query
BLANK = " "
Tasks = Mapping[str, Sequence[EvalQuery]]


def read_tasks(benchmark: Benchmark, folder: Path) -> dict[str, list[EvalQuery]]:
    """Queries of every task, all in memory; `TaskReader` reads one task at a time.

    Raises:
        UserError: for a set that cannot be read or does not have the stated size.
    """
    reader = TaskReader(benchmark, folder)
    return {task.name: reader[task.name] for task in benchmark.tasks}


def check_tasks(tasks: Tasks, top: int = 0) -> tuple[int, int]:
    """Reads every task once and checks that its images exist; images are not decoded.

    Args:
        tasks: The tasks.
        top: Number of candidates of each query that will be reranked.

    Returns:
        The numbers of inputs and of pairs to rerank for which an evaluation reports progress.

    Raises:
        UserError: for the first missing set or image.
    """
    inputs = pairs = 0
    for name in tasks:
        queries = tasks[name]
        for image in dict.fromkeys(images_of({name: queries})):
            if not image.exists():
                raise UserError(f"{image}: the image is missing; `vlm2vec data check` lists what is missing")
        inputs += num_inputs(queries)
        pairs += sum(min(top, len(query.candidates)) for query in queries)
    return inputs, pairs


def images_of(tasks: Tasks) -> Iterable[ImageRef]:
    """Every image of these tasks, repeats included."""
    for queries in tasks.values():
        for item in distinct_inputs(queries):
            yield from item.images
            yield from item.video.frames if item.video is not None else ()


def distinct_inputs(queries: Iterable[EvalQuery]) -> list[EmbeddingInput]:
    """Queries and candidates without repeats, in order."""
    by_place: dict[int, EmbeddingInput] = {}
    seen: set[int] = set()
    for query in queries:
        by_place[id(query.query)] = query.query
        if id(query.candidates) not in seen:  # in global scope all queries share one tuple
            seen.add(id(query.candidates))
            by_place.update(zip(map(id, query.candidates), query.candidates, strict=True))
    return list(dict.fromkeys(by_place.values()))


def num_inputs(queries: Iterable[EvalQuery]) -> int:
    """The number of inputs for which `evaluate` reports progress on a task, cached ones included."""
    return len(distinct_inputs(queries))


@dataclass(frozen=True)
class Share:
    """The part of the encoding that a rank does, and the barrier between ranks.

    Attributes:
        rank: This process's rank; only rank 0 returns results.
        world_size: Number of processes.
        wait: The barrier; returns when every rank has called it.
        gather: The results of all ranks, in rank order.
    """

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None
    gather: Callable[[list[TaskResult]], list[list[TaskResult]]] = lambda results: [results]


class FillCache(Protocol):
    """Encodes inputs that a cache lacks; as `vlm2vec.retrieval.embedding_cache.fill` without its encoder."""

    def __call__(
        self,
        cache: VectorCache,
        items: Mapping[bytes, EmbeddingInput],
        *,
        part_size: int,
        share: tuple[int, int],
        progress: Callable[[int], None],
    ) -> Any: ...


def filling(encoder: Encoder) -> FillCache:
    """A function that encodes in this process, block by block."""

    def fill_here(cache: VectorCache, items: Mapping[bytes, EmbeddingInput], **options: Any) -> int:
        return fill(cache, items, encoder.encode, **options)

    return fill_here


def evaluate(
    encoder: Encoder | FillCache,
    benchmark: Benchmark,
    tasks: Tasks,
    progress: Callable[[int], None] = lambda done: None,
    cache: VectorCache | None = None,
    share: Share = Share(),
    second: SecondStage | None = None,
) -> list[TaskResult]:
    """Scores an encoder on every task.

    Args:
        encoder: Anything with `encode`, or a function that encodes what an embedding cache lacks.
        benchmark: The tasks' facts.
        tasks: Their queries, from `read_tasks` or a `TaskReader`.
        progress: Called with the number of inputs done since the last call, cached ones included.
        cache: Embedding cache; None: in memory, for the length of this job. Several processes need one
            that they all see.
        share: This rank's part of the encoding.
        second: Reranks the first candidates of each query; None: results have the embedder's scores alone.

    Returns:
        A result for each task, in the benchmark's order; empty on ranks other than 0.
    """
    cache = MemoryCache() if cache is None else cache
    fill_cache = filling(encoder) if isinstance(encoder, Encoder) else encoder
    key_of = InputKeys()
    merged = benchmark.quirks.duplicates == "merged"
    seconds: dict[str, float] = {}
    results = []
    told = progress if share.world_size == 1 else lambda done: None  # of pairs; with several ranks `fill` tells it

    def score(task: EvalTask, queries: Sequence[EvalQuery], table: _Table) -> None:
        result = score_task(task, queries, table, key_of, seconds[task.name], merged)
        if second is not None:
            result.reranked = second(task, queries, table, key_of, merged, told)
        results.append(result)

    for task in benchmark.tasks:
        since = time.perf_counter()
        queries = tasks[task.name]
        by_key = {key_of(item): _encodable(item) for item in distinct_inputs(queries)}
        fill_cache(cache, by_key, part_size=PART, share=(share.rank, share.world_size), progress=progress)
        share.wait()  # a later task finds every vector of this one, so no input is encoded twice
        seconds[task.name] = time.perf_counter() - since
        if share.world_size == 1 or second is not None:
            cache.refresh()
            table = _Table(cache, list(by_key))
        if share.world_size == 1:
            score(task, queries, table)
        elif second is not None:  # which takes far longer than ranking, so queries are dealt, not tasks
            second.fill(queries, table, key_of, merged, (share.rank, share.world_size), progress)
    if share.world_size > 1:  # each rank ranks whole tasks, once all vectors and scores of pairs are there
        share.wait()
        cache.refresh()
        for task in benchmark.tasks[share.rank :: share.world_size]:
            queries = tasks[task.name]
            score(task, queries, _Table(cache, [*dict.fromkeys(key_of.of(distinct_inputs(queries)))]))
    by_name = {result.task.name: result for found in share.gather(results) for result in found}
    return [] if share.rank else [by_name[task.name] for task in benchmark.tasks]


def _encodable(item: EmbeddingInput) -> EmbeddingInput:
    """A blank for an empty text, which published candidates have and models refuse."""
    is_empty = not (item.text or item.images or item.video)
    return dataclasses.replace(item, text=BLANK) if is_empty else item


class _Table:
    """A task's vectors by input."""

    def __init__(self, cache: VectorCache, keys: list[bytes]) -> None:
        self._rows = cache.rows(keys)
        if isinstance(self._rows, CachedRows) and 0 < self._rows.nbytes <= IN_MEMORY:
            self._rows = self._rows[:]  # queries of local scope read the same rows again and again
        self._place = {key: i for i, key in enumerate(keys)}

    def __call__(self, keys: Sequence[bytes]) -> Any:
        places = np.fromiter(map(self._place.__getitem__, keys), np.int64, len(keys))
        if isinstance(self._rows, np.ndarray):
            return self._rows.take(places, axis=0)
        if len(places) <= READ_AT_ONCE:
            return self._rows[places]
        return self._rows.view(places)


def results_json(
    model: str, benchmark: Benchmark, results: list[TaskResult], about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `results.json`: scores 0 to 1, group scores as unweighted means over tasks.

    Args:
        model: The evaluated model, as the user named it.
        benchmark: The benchmark's facts.
        results: One for each task.
        about: What the scores depend on (template hash, versions, …), but nothing that differs between equal runs.
    """
    groups = groups_of([result.task for result in results])
    reranked = {result.task.name: result.reranked.score for result in results if result.reranked}
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
                "modality": result.task.modality,
                "interval": list(result.interval) if result.interval else None,
                "metrics": result.metrics,
                **({"reranked": _reranked_json(result.reranked)} if result.reranked else {}),
            }
            for result in results
        },
        "groups": group_means({result.task.name: result.score for result in results}, groups),
        **({"reranked_groups": group_means(reranked, groups)} if reranked else {}),
        **({"about": dict(about)} if about else {}),
    }


def _reranked_json(reranked: Reranked) -> dict[str, Any]:
    names = ("model", "top", "score", "seconds_per_query", "num_unreadable", "metrics")
    return {**{name: getattr(reranked, name) for name in names}, "interval": list(reranked.interval)}


def groups_of(tasks: Sequence[EvalTask]) -> dict[str, tuple[str, ...]]:
    """The groups of each task: meta-task, ind or ood, and the modality if the tasks have several."""
    several = len({task.modality for task in tasks}) > 1
    return {
        task.name: tuple(
            group for group in (task.meta_task, task.modality if several else None, task.split) if group is not None
        )
        for task in tasks
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Reads `results.json` of an evaluation.

    Raises:
        UserError: if the file is missing.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; run `vlm2vec eval` with --output {folder} first")
    content: dict[str, Any] = json.loads(path.read_text())
    return content
