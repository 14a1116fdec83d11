"""Writes the rows of an index job: encodes them in groups and commits them in parts.

A part is at most 4,096 rows or about 30 seconds, so a killed process loses at most one part. An input is held
only until its group of 512 is encoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vlm2vec.errors import UserError
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
Put = Callable[[list[str], np.ndarray, list[dict[str, Any]]], None]


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


class _Encoded:
    """Rows with a vector that wait for one commit, by column: no input is held, and no object per row."""

    def __init__(self, put: Put) -> None:
        self._put = put
        self.keys: list[str] = []
        self.digests: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._metadata: list[dict[str, Any]] = []

    def append(self, row: Row, vector_D: np.ndarray) -> None:
        """Takes a row."""
        self.keys.append(row.key)
        self.digests.append(row.digest)
        self._vectors.append(vector_D)
        self._metadata.append(row.metadata)

    def write(self) -> None:
        """Commits the rows, if there are any."""
        if self.keys:
            self._put(self.keys, np.concatenate(self._vectors).reshape(len(self.keys), -1), self._metadata)


class Writer:
    """Encodes rows in groups and writes them in parts; known content takes the vectors of the store."""

    def __init__(self, encoder: DocumentEncoder, store: VectorStore, report: IndexReport, state: StoreState) -> None:
        self.encoder, self.store, self.report, self.known = encoder, store, report, state.rows
        self.by_digest = {row.digest: key for key, row in state.rows.items() if row.digest}
        self.waiting: list[Row] = []
        self.waiting_bytes = 0
        self.part = min(FIRST_PART, PART)
        self.changed: set[str] = set()
        self._begin_part()

    def add(self, row: Row) -> None:
        """Takes a row; encodes the rows that wait if they are enough, and commits the part when it is full."""
        self.waiting.append(row)
        self.waiting_bytes += row.num_bytes()
        rest = self.part - self.num_done - len(self.waiting)
        if rest <= 0 or len(self.waiting) >= ENCODED_AT_ONCE or self.waiting_bytes >= PART_BYTES:
            self._encode_waiting()
            if rest <= 0 or time.monotonic() - self.since >= COMMIT_SECONDS:
                self._commit()

    def flush(self) -> None:
        """Encodes and commits the rows that are left."""
        self._encode_waiting()
        self._commit()

    def _begin_part(self) -> None:
        self.new_rows, self.changed_rows = _Encoded(self.store.add), _Encoded(self.store.upsert)
        self.num_done, self.since = 0, time.monotonic()

    def _commit(self) -> None:
        """Writes encoded rows: new ones in one commit, changed ones in another."""
        for rows in (self.new_rows, self.changed_rows):
            rows.write()
            self.by_digest.update(zip(rows.digests, rows.keys, strict=True))
        self.report.num_changed += len(self.changed_rows.keys)
        self.report.num_new += len(self.new_rows.keys)
        self.changed.update(self.changed_rows.keys)
        self._begin_part()

    def _encode_waiting(self) -> None:
        """Finds the vectors of the rows that wait, and makes the part as large as the encoder allows in its seconds."""
        rows, self.waiting, self.waiting_bytes = self.waiting, [], 0
        self._take_known(rows)
        missing, since = [row for row in rows if row.vector_D is None], time.monotonic()
        _encode(missing, self.encoder, self.report)
        if missing:
            seconds = max(time.monotonic() - since, 1e-6)
            self.part = max(1, min(PART, int(len(missing) / seconds * COMMIT_SECONDS)))
        self.num_done += len(rows)
        for row in rows:
            if row.vector_D is not None:
                (self.changed_rows if row.key in self.known else self.new_rows).append(row, row.vector_D)

    def _take_known(self, part: list[Row]) -> None:
        keys = {self.by_digest[row.digest] for row in part if row.digest in self.by_digest}
        if not keys:
            return
        found = self.store.fetch(sorted(keys), STATE, vectors=True)
        rows = [] if found.vectors_ND is None else list(found.vectors_ND)
        vectors = {one.get(f"{PREFIX}digest"): vector for one, vector in zip(found.metadata, rows, strict=True)}
        for row in part:
            row.vector_D = vectors.get(row.digest)


def _encode(rows: list[Row], encoder: DocumentEncoder, report: IndexReport) -> None:
    """Computes the vectors of rows; rows that cannot be read stay without one and are reported."""
    if not rows:
        return
    bad: set[int] = set()

    def on_error(position: int, error: UserError) -> None:
        bad.add(position)
        report.errors.append((rows[position].key, printable(str(error))))

    vectors_ND = encoder.encode_document([row.item for row in rows], on_error=on_error)
    for position, (row, vector) in enumerate(zip(rows, vectors_ND, strict=True)):
        if position not in bad:
            row.vector_D = vector
            report.num_encoded += 1
