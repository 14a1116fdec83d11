"""Writes the rows of an index job: encodes them in groups and commits them in parts.

A part is at most 4,096 rows or about 30 seconds, so a killed process loses at most one part. An input is held
only until its group of 512 is encoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.state import STATE, StoreState
from vlm2vec.media.text import printable
from vlm2vec.retrieval.metadata import PREFIX
from vlm2vec.retrieval.vector_store import IndexFacts, VectorStore
from vlm2vec.types import EmbeddingInput

FIRST_PART, PART = 16, 4096
"""Rows of the first commit and the most of a commit, whose cost grows with the number of commits before it."""
ENCODED_AT_ONCE = 512
COMMIT_SECONDS = 30.0
"""Time between two commits: the size of a part follows the encoder's speed, from `FIRST_PART` up to `PART` rows."""
PART_BYTES = 256 << 20  # of encoded images that wait to be encoded


@runtime_checkable
class DocumentEncoder(Protocol):
    """Computes the vectors."""

    def encode_document(self, inputs: Sequence[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order; `on_error(position, error)` is called for an unreadable input."""
        ...


@dataclass
class IndexReport:
    """The changes that a run made.

    Attributes:
        num_new, num_changed: Rows written. `num_encoded` of them were encoded; the content of the others was known.
        num_same: Rows that were up to date.
        num_removed: Rows whose input is gone or can no longer be read.
        errors: (key, reason) of inputs that could not be read.
        gone: Other sources in the store whose path no longer exists, with the number of their rows.
        index: How the store is searched now.
    """

    num_new: int = 0
    num_changed: int = 0
    num_encoded: int = 0
    num_same: int = 0
    num_removed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    gone: dict[str, int] = field(default_factory=dict)
    index: IndexFacts = field(default_factory=lambda: IndexFacts("exact", "not determined"))


@dataclass(slots=True)
class Row:
    """A record on its way into the store; `item` holds the images' bytes, so that they are read once."""

    key: str
    item: EmbeddingInput
    metadata: dict[str, Any]
    digest: str
    vector_D: np.ndarray | None = None

    def num_bytes(self) -> int:
        """Bytes of images held."""
        return sum(len(image.data) for image in self.item.images if image.data is not None)


class Encoded(NamedTuple):
    """A row with its vector and without its input."""

    key: str
    digest: str
    metadata: dict[str, Any]
    vector_D: np.ndarray


class Reader(Protocol):
    """Reads a record; a record that cannot be read is an entry of the report."""

    root: str
    keep_images: bool

    def row(self, key: str, record: Record) -> Row | None:
        """The row of a record; None if it cannot be read."""
        ...


class IndexWriter(Protocol):
    """Encodes records and writes them to a store."""

    def add(self, key: str, record: Record) -> None:
        """Takes a record that is new or has changed."""
        ...

    def flush(self) -> None:
        """Writes the records that are left."""
        ...


OpenWriter = Callable[["Commits", Reader], IndexWriter]


class _Columns:
    """Rows that wait for one commit, by column: no object per row."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.digests: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        self.vectors: list[np.ndarray] = []

    def append(self, row: Encoded) -> None:
        """Takes a row."""
        self.keys.append(row.key)
        self.digests.append(row.digest)
        self.metadata.append(row.metadata)
        self.vectors.append(row.vector_D)

    def write(self, put: Callable[[list[str], np.ndarray, list[dict[str, Any]]], None]) -> None:
        """Commits the rows, if there are any."""
        if self.keys:
            put(self.keys, np.concatenate(self.vectors).reshape(len(self.keys), -1), self.metadata)


class Commits:
    """The part of a store that is being written.

    Attributes:
        known: Rows that the store had before.
        changed: Keys of the rows that were replaced.
        size: Rows of a part.
        num_done: Rows of this part, unreadable ones included.
    """

    def __init__(self, store: VectorStore, report: IndexReport, state: StoreState) -> None:
        self.store, self.report, self.known = store, report, state.rows
        self.by_digest = {row.digest: key for key, row in state.rows.items() if row.digest}
        self.changed: set[str] = set()
        self.size = min(FIRST_PART, PART)
        self._begin()

    def _begin(self) -> None:
        self._new, self._replaced = _Columns(), _Columns()
        self.num_done, self._since = 0, time.monotonic()

    def extend(self, rows: Iterable[Encoded], num_done: int) -> None:
        """Takes the rows of `num_done` records; commits the part when it is full or `COMMIT_SECONDS` have passed."""
        for row in rows:
            (self._replaced if row.key in self.known else self._new).append(row)
        self.num_done += num_done
        if self.num_done >= self.size or time.monotonic() - self._since >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Writes the rows: new ones in one commit, changed ones in another."""
        self._new.write(self.store.add)
        self._replaced.write(self.store.upsert)
        for rows in (self._new, self._replaced):
            self.by_digest.update(zip(rows.digests, rows.keys, strict=True))
        self.report.num_new += len(self._new.keys)
        self.report.num_changed += len(self._replaced.keys)
        self.changed.update(self._replaced.keys)
        self._begin()


class Writer:
    """Encodes rows in this process; known content takes the vectors of the store."""

    def __init__(self, encoder: DocumentEncoder, commits: Commits, reader: Reader) -> None:
        self.encoder, self.commits, self.reader = encoder, commits, reader
        self._waiting: list[Row] = []
        self._waiting_bytes = 0

    def add(self, key: str, record: Record) -> None:
        """Reads a record, and encodes the rows that wait if they are enough."""
        row = self.reader.row(key, record)
        if row is None:
            return
        self._waiting.append(row)
        self._waiting_bytes += row.num_bytes()
        enough = min(ENCODED_AT_ONCE, self.commits.size - self.commits.num_done)
        if len(self._waiting) >= enough or self._waiting_bytes >= PART_BYTES:
            self._encode()

    def flush(self) -> None:
        """Encodes and commits the rows that are left."""
        self._encode()
        self.commits.commit()

    def _encode(self) -> None:
        """Finds the vectors of the rows that wait; the next part is as large as the encoder allows in its seconds."""
        rows, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._take_known(rows)
        missing, since = [row for row in rows if row.vector_D is None], time.monotonic()
        encode_rows(missing, self.encoder, self.commits.report, self.commits.store.facts.instruction)
        seconds = max(time.monotonic() - since, 1e-6)
        self.commits.extend(with_vectors(rows), len(rows))
        if missing:
            self.commits.size = max(1, min(PART, int(len(missing) / seconds * COMMIT_SECONDS)))

    def _take_known(self, part: list[Row]) -> None:
        by_digest = self.commits.by_digest
        keys = {by_digest[row.digest] for row in part if row.digest in by_digest}
        if not keys:
            return
        found = self.commits.store.fetch(sorted(keys), STATE, vectors=True)
        rows = [] if found.vectors_ND is None else list(found.vectors_ND)
        vectors = {one.get(f"{PREFIX}digest"): vector for one, vector in zip(found.metadata, rows, strict=True)}
        for row in part:
            row.vector_D = vectors.get(row.digest)


def encode_rows(rows: list[Row], encoder: DocumentEncoder, report: IndexReport, instruction: str | None) -> None:
    """Computes the vectors of rows; rows that cannot be read stay without one and are reported.

    Args:
        rows: Receive their vectors.
        encoder: The store's model.
        report: Receives the errors.
        instruction: Instruction of the store's documents, for inputs without their own; None: there is none.
    """
    if not rows:
        return
    bad: set[int] = set()

    def on_error(position: int, error: UserError) -> None:
        bad.add(position)
        report.errors.append((rows[position].key, printable(str(error))))

    given = {} if instruction is None else {"instruction": instruction}
    vectors_ND = encoder.encode_document([row.item for row in rows], on_error=on_error, **given)
    for position, (row, vector) in enumerate(zip(rows, vectors_ND, strict=True)):
        if position not in bad:
            row.vector_D = vector
            report.num_encoded += 1


def with_vectors(rows: Iterable[Row]) -> list[Encoded]:
    """The rows that have a vector, without their inputs."""
    return [Encoded(row.key, row.digest, row.metadata, row.vector_D) for row in rows if row.vector_D is not None]
