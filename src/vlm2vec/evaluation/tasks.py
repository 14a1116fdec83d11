"""Queries of a benchmark's tasks, read from a data folder one task at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vlm2vec.data.mmeb.corpora import read_corpus_set
from vlm2vec.data.mmeb.documents import read_visdoc_set
from vlm2vec.data.mmeb.gui import read_gui_set
from vlm2vec.data.mmeb.images import read_eval_set
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.data.mmeb.videos import read_video_set
from vlm2vec.data.records import read_eval_records
from vlm2vec.errors import UserError, did_you_mean, shown
from vlm2vec.evaluation.benchmark import Benchmark, EvalTask
from vlm2vec.types import EmbeddingInput, EvalQuery

Reader = Callable[[EvalTask, Path, Quirks], list[EvalQuery]]
READERS: dict[str, Reader] = {
    "mmeb": lambda task, folder, quirks: read_eval_set(folder, task.name, task.kind, quirks),
    "video": lambda task, folder, quirks: read_video_set(folder, task.name, quirks, task.hub_split),
    "visdoc": lambda task, folder, quirks: read_visdoc_set(folder, task.name, task.language, quirks),
    "corpus": lambda task, folder, quirks: read_corpus_set(folder, task.name, task.files or {}),
    "gui": lambda task, folder, quirks: read_gui_set(folder, task.config or "", task.hub_split or "", quirks),
    "records": lambda task, folder, quirks: read_eval_records(folder / task.name),
}
"""Functions that read one task's queries from a data folder, by the name under `reader` in a benchmark file."""


class TaskReader(Mapping[str, list[EvalQuery]]):
    """Reads a task when it is accessed, so that memory holds one task at a time."""

    def __init__(self, benchmark: Benchmark, folder: Path) -> None:
        self._benchmark, self._folder = benchmark, folder
        self._tasks = {task.name: task for task in benchmark.tasks}

    def __getitem__(self, name: str) -> list[EvalQuery]:
        task = self._tasks[name]
        queries = read_task(task, self._folder, self._benchmark.quirks)
        for problem in wrong_counts(task, queries):
            raise UserError(f"{self._folder / task.name}: {problem} in {self._benchmark.name}")
        return queries

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def read_task(task: EvalTask, folder: Path, quirks: Quirks) -> list[EvalQuery]:
    """Queries of one task; in global scope all share one candidate tuple.

    Raises:
        UserError: for a set that is missing or cannot be read, or whose reader is missing or unknown.
    """
    if task.reader is None:
        raise UserError(f"{task.name}: has no reader yet; name other tasks with --task")
    if task.reader not in READERS:
        near = did_you_mean(task.reader, READERS) or ";"
        raise UserError(f"{task.name}: unknown reader {shown(task.reader)}{near} expected one of {', '.join(READERS)}")
    queries = READERS[task.reader](task, folder, quirks)
    if not queries:
        raise UserError(f"{folder / task.name}: no queries there; expected at least one record")
    return _shared(queries) if task.scope == "global" else queries


def wrong_counts(task: EvalTask, queries: list[EvalQuery]) -> list[str]:
    """Messages for a number of queries or candidates that differs from the stated one."""
    most = max(len(query.candidates) for query in queries)
    counts = (("num_queries", task.num_queries, len(queries)), ("num_candidates", task.num_candidates, most))
    return [
        f"{what} is {found}, but the benchmark states {stated}"
        for what, stated, found in counts
        if stated is not None and stated != found
    ]


def _shared(queries: list[EvalQuery]) -> list[EvalQuery]:
    """The queries with one common candidate tuple: every distinct candidate of the set, in order."""
    if len({id(query.candidates) for query in queries}) == 1:
        return queries
    everything = tuple(dict.fromkeys(item for query in queries for item in query.candidates))
    place: dict[EmbeddingInput, int] = {item: i for i, item in enumerate(everything)}
    return [EvalQuery(q.query, everything, tuple(place[q.candidates[i]] for i in q.relevant), q.gains) for q in queries]
