"""Vector store: the interface to a database of vectors with metadata. Independent of any model.

    store = open_store("photos.lance")                     # LanceDB: a folder on this machine
    store = open_store("qdrant://localhost:6333/photos")   # Qdrant: a server
    for hit in store.search(vector, k=10, where="width > 600"):
        hit.key, hit.score, hit.metadata

Shapes: N rows, D embedding dim. Vectors have unit norm; a score is a cosine.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from vlm2vec.errors import UserError, shown

LANCE_ENDING = ".lance"
QDRANT_SCHEME = "qdrant://"
PRECISIONS = ("float32", "float16")
EXACT_BELOW = 100_000
SCAN_ROWS = 4096


@dataclass(frozen=True)
class StoreFacts:
    """The model and settings that made a store's vectors; written when the store is created.

    Attributes:
        model: Source of the model: a folder, a hub id or a built-in name.
        fingerprint: Identifies weights, template and processor; vectors of another fingerprint are not comparable.
        dim: Length of the vectors.
        precision: Storage precision of the vectors: float32 or float16.
        instruction: Instruction of the documents; None: the documents were encoded without one.
        dtype: Data type of the model's weights, such as "bfloat16"; None: the machine's default.
        options: Settings of the model's family.
        about: The parts of the fingerprint, so that an error can name what differs.
    """

    model: str
    fingerprint: str
    dim: int
    precision: str = "float32"
    instruction: str | None = None
    dtype: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The facts as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> StoreFacts:
        """The facts from the output of `to_json`.

        Raises:
            UserError: if another version wrote them.
        """
        try:
            return StoreFacts(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"facts of the store {shown(text)}: made by another version of vlm2vec; index again"
            ) from error

    def require_same_model(self, other: StoreFacts, uri: str) -> None:
        """Refuses vectors of another model.

        Raises:
            UserError: if fingerprint, dimension, precision or instruction differ; the message names the difference.
        """
        if self.fingerprint != other.fingerprint:
            names = [name for name in sorted(self.about) if self.about[name] != other.about.get(name)]
            raise UserError(
                f"{uri}: was made with {self.model} and cannot be used with {other.model}: another "
                f"{', '.join(names) or 'model'}; use the store's model, or index into another store"
            )
        if (self.dim, self.precision) != (other.dim, other.precision):
            raise UserError(
                f"{uri}: keeps {self.dim} dimensions in {self.precision}, not {other.dim} in {other.precision}; "
                "use the store's settings, or index into another store"
            )
        if self.instruction != other.instruction:
            raise UserError(
                f"{uri}: its documents were encoded with instruction {shown(self.instruction)}, "
                f"not {shown(other.instruction)}; use the store's instruction, or index into another store"
            )


@dataclass(frozen=True)
class Hit:
    """One result of a search: the row's key, its cosine to the query, and its metadata."""

    key: str
    score: float
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of a store, in order; `vectors_ND` is None unless vectors were requested."""

    keys: list[str]
    metadata: list[dict[str, Any]]
    vectors_ND: np.ndarray | None = None


@dataclass(frozen=True)
class IndexFacts:
    """How a store is searched: `kind` is "exact" or the index's name; `reason` says why."""

    kind: str
    reason: str


class VectorStore(Protocol):
    """A database of vectors with metadata (see `vlm2vec.retrieval.metadata`). Each write is complete or absent.

    Filters (`where`) are SQL conditions on metadata, see `vlm2vec.retrieval.metadata.resolve_fields`.
    """

    uri: str
    facts: StoreFacts

    def count(self, where: str | None = None) -> int:
        """Number of rows, or of the rows that match a filter."""
        ...

    def fields(self) -> dict[str, str]:
        """Fields of the metadata with their types: "text", "number", "truth" or "bytes"."""
        ...

    def upsert(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, or replaces rows of the same key. Once it returns, a kill cannot lose them."""
        ...

    def add(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows whose keys are not in the store yet, at a cost that does not depend on its size."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Removes rows; absent keys are ignored."""
        ...

    def scan(
        self, fields: Sequence[str] | None = None, where: str | None = None, *, vectors: bool = False
    ) -> Iterator[Rows]:
        """All rows, or those that match a filter, in blocks; `fields` None: all metadata except thumbnails."""
        ...

    def fetch(self, keys: Sequence[str], fields: Sequence[str] | None = None, *, vectors: bool = False) -> Rows:
        """The rows with these keys, in the order of `keys`; absent keys are left out."""
        ...

    def search(self, vector_D: np.ndarray, k: int, where: str | None = None, *, exact: bool = False) -> list[Hit]:
        """The k nearest rows, best first; equal scores by key. `exact` compares all vectors, without the index."""
        ...

    def build_index(self, kind: str | None = None, *, unread: bool = False) -> IndexFacts:
        """Builds the index of a kind (None: chosen by the number of rows), and compacts the store.

        `unread`: no other process has it open, so files that were replaced are removed at once and not after a day.
        """
        ...

    def close(self) -> None:
        """Closes the connection to the database."""
        ...


def absent(uri: str) -> UserError:
    """The error for a store that does not exist."""
    return UserError(f"{uri}: no such store; make it with: vlm2vec index MODEL FOLDER --store {shlex.quote(uri)}")


def choose_kind(num_rows: int, kind: str | None, above: str, offered: Sequence[str]) -> IndexFacts:
    """The kind of index for a number of rows.

    Args:
        num_rows: Rows in the store.
        kind: The kind that the user chose; None: exact search below `EXACT_BELOW` rows, else `above`.
        above: The database's default index for many rows.
        offered: All kinds that the database supports.

    Raises:
        UserError: for an unsupported kind.
    """
    if kind is not None:
        if kind not in ("exact", *offered):
            raise UserError(f"index {shown(kind)}: expected one of exact, {', '.join(offered)}")
        return IndexFacts(kind, f"requested; {num_rows:,} rows")
    if num_rows < EXACT_BELOW:
        return IndexFacts("exact", f"{num_rows:,} rows, fewer than {EXACT_BELOW:,}")
    return IndexFacts(above, f"{num_rows:,} rows, {EXACT_BELOW:,} or more")


def best_first(hits: list[Hit]) -> list[Hit]:
    """Hits in the order that every store returns: by score, then by key."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.key))
