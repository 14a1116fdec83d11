"""Index a source on a Ray cluster, with the rows of the local engine.

The driver lists the source once and gives each worker one group of new and changed records at a time. A worker reads
the images of its group, encodes them and returns rows with vectors. The driver alone writes to the store, so a worker
that dies and is replaced can neither lose nor double a row, and no second copy of the vectors is written. All workers
must be able to reach the source.

A worker does not see the store: content that the store has under another key is encoded again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm2vec.distributed.cluster import RayPool, actors, answers
from vlm2vec.jobs.index_writer import (
    COMMIT_SECONDS,
    ENCODED_AT_ONCE,
    FIRST_PART,
    PART,
    Commits,
    DocumentEncoder,
    Encoded,
    IndexReport,
    OpenWriter,
    Reader,
    encode_rows,
    with_vectors,
)
from vlm2vec.jobs.indexing import RecordReader
from vlm2vec.jobs.records import Record

Group = list[tuple[str, Record]]
Answer = tuple[list[Encoded], list[tuple[str, str]], float]


class IndexWorker:
    """A Ray actor that loads the model once, and reads and encodes groups of records."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vlm2vec.models.embedder import Embedder

        self.encoder: DocumentEncoder = Embedder.from_pretrained(model, **options)

    def encode(self, group: Group, root: str, keep_images: bool, instruction: str | None) -> Answer:
        """Return the rows of a group, the records that cannot be read with their reasons, and the seconds it took."""
        since, report = time.monotonic(), IndexReport()
        reader = RecordReader(root, keep_images, report)
        rows = [row for key, record in group if (row := reader.row(key, record)) is not None]
        encode_rows(rows, self.encoder, report, instruction)
        return with_vectors(rows), report.errors, time.monotonic() - since


class RayWriter:
    """Give groups of records to actors, and commit the rows that they return; see `IndexWriter`.

    Args:
        workers: Handles of `IndexWorker` actors.
        commits: The part of the store that is being written.
        reader: Says how the workers read records.
    """

    def __init__(self, workers: list[Any], commits: Commits, reader: Reader) -> None:
        from ray.util import ActorPool

        self.commits, self.reader = commits, reader
        self.commits.size = PART
        self._actors = ActorPool(workers)
        self._waiting: Group = []
        self._group = FIRST_PART

    def add(self, key: str, record: Record) -> None:
        """Take a record; give its group to a worker when it is large enough."""
        self._waiting.append((key, record))
        if len(self._waiting) >= self._group:
            self._give()

    def flush(self) -> None:
        """Wait for all groups and commit the rows that are left."""
        if self._waiting:
            self._give()
        while self._actors.has_next():
            self._take()
        self.commits.commit()

    def _give(self) -> None:
        """Give the group to a free worker; wait for one if all are busy."""
        if not self._actors.has_free():
            self._take()
        group, self._waiting = self._waiting, []
        how = (self.reader.root, self.reader.keep_images, self.commits.store.facts.instruction)
        self._actors.submit(lambda worker, group: worker.encode.remote(group, *how), group)

    def _take(self) -> None:
        """Commit the rows of a finished group; later groups take at most `COMMIT_SECONDS` at the speed of this one."""
        rows, errors, seconds = answers(self._actors.get_next_unordered)
        report, num_records = self.commits.report, len(rows) + len(errors)
        report.errors += errors
        report.num_encoded += len(rows)
        self._group = max(1, min(ENCODED_AT_ONCE, int(num_records / max(seconds, 1e-6) * COMMIT_SECONDS)))
        self.commits.extend(rows, num_records)


@contextmanager
def ray_writer(pool: RayPool) -> Iterator[OpenWriter]:
    """Start the workers; they run for the duration of the block.

    Yields:
        What `index_source` opens its writer with.

    Raises:
        UserError: if Ray is not installed.
    """
    with actors(pool, IndexWorker) as workers:
        yield lambda commits, reader: RayWriter(workers, commits, reader)
