"""Vectors in a database, to be searched: what a store is, whichever database keeps it. Knows no model.

    store = open_store("photos.lance")                     # LanceDB: a folder on this machine
    store = open_store("qdrant://localhost:6333/photos")   # Qdrant: a server
    for hit in store.search(vector, k=10, where="width > 600"):
        hit.key, hit.score, hit.metadata

Shapes: N rows, D embedding dim. Vectors have unit norm; a score is a cosine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from typing import Any, Protocol

import numpy as np

from vlm2vec.errors import UserError

LANCE_ENDING = ".lance"
QDRANT_SCHEME = "qdrant://"
PRECISIONS = ("float32", "float16")
EXACT_BELOW = 100_000
IMAGE = "picture"
RESERVED = ("key", "vector")
SCAN_ROWS = 4096
MAX_WHOLE = 1 << 53  # larger ones are kept as text: a float64 would change them


@dataclass(frozen=True)
class StoreFacts:
    """What made a store's vectors; written when the store is made.

    Attributes:
        model: What loads the model: a folder, a hub id or a built-in name.
        fingerprint: Identifies weights, template and processor; vectors of another fingerprint are not comparable.
        dim: Length of the vectors.
        precision: In which they are kept: float32 or float16.
        instruction: Of the documents.
        dtype: Precision of the model's weights, such as "bfloat16"; None: the machine's default.
        options: Settings of the model's family.
        about: What the fingerprint was made from, so that a refusal can say what differs.
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
        """One line that `from_json` reads."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> StoreFacts:
        """Reads what `to_json` wrote."""
        return StoreFacts(**json.loads(text))

    def require_same_model(self, other: StoreFacts, uri: str) -> None:
        """Refuses vectors of another model.

        Raises:
            UserError: if fingerprint, dimension or the documents' precision differ; the message says in what.
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
                f"{uri}: its documents were encoded with instruction {self.instruction!r}, not {other.instruction!r}; "
                "use the store's instruction, or index into another store"
            )


@dataclass(frozen=True)
class Hit:
    """One result of a search: the row's key, its cosine to the query, and its metadata."""

    key: str
    score: float
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of a store, in order; `vectors_ND` is None where vectors were not asked for."""

    keys: list[str]
    metadata: list[dict[str, Any]]
    vectors_ND: np.ndarray | None = None


@dataclass(frozen=True)
class IndexFacts:
    """How a store is searched, and why so: `kind` is "exact" or the index's name."""

    kind: str
    reason: str


class VectorStore(Protocol):
    """A database of vectors with metadata. Every write is kept whole or not at all."""

    uri: str
    facts: StoreFacts

    def count(self, where: str | None = None) -> int:
        """Rows, all or those of a filter."""
        ...

    def fields(self) -> dict[str, str]:
        """Names of the metadata, and of each "text", "number", "truth" or "bytes"."""
        ...

    def upsert(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, or replaces those whose key is there. Once it returns, a kill cannot lose them."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Removes rows; absent keys are passed over."""
        ...

    def scan(
        self, fields: Sequence[str] | None = None, where: str | None = None, *, vectors: bool = False
    ) -> Iterator[Rows]:
        """All rows, or those of a filter, in blocks; `fields` None: all metadata but kept images."""
        ...

    def fetch(self, keys: Sequence[str], fields: Sequence[str] | None = None, *, vectors: bool = False) -> Rows:
        """The rows of these keys that are there, in the order of `keys`."""
        ...

    def search(self, vector_D: np.ndarray, k: int, where: str | None = None, *, exact: bool = False) -> list[Hit]:
        """The k nearest rows, best first; equal scores by key. `exact` passes an index by."""
        ...

    def build_index(self, kind: str | None = None) -> IndexFacts:
        """Makes searching fast where there are many rows, and tidies up; `kind` None: chosen by their number."""
        ...

    def close(self) -> None:
        """Lets the database go."""
        ...


def absent(uri: str) -> UserError:
    """What to say of a store that is not there."""
    return UserError(f"{uri}: no such store; make it with: vlm2vec index MODEL FOLDER --store {uri}")


def clean_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as every database keeps it: plain names, and texts, numbers or truth values; anything else as JSON.

    Only the field `image` may be bytes.
    """
    clean = {}
    for name, value in metadata.items():
        name = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
        name = f"_{name}" if name[0].isdigit() else name
        clean[f"{name}_" if name in RESERVED else name] = value if name == IMAGE else _plain(value)
    return clean


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > MAX_WHOLE:
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, date | datetime):
        return value.isoformat()
    return json.dumps(value, sort_keys=True, default=str)


def choose_kind(num_rows: int, kind: str | None, above: str, offered: Sequence[str]) -> IndexFacts:
    """Which index a store of so many rows gets.

    Args:
        num_rows: In the store.
        kind: What the user asked for; None: exact search where it is fast, else `above`.
        above: The store's own choice for many rows.
        offered: Every kind that the store has.

    Raises:
        UserError: for a kind that the store does not have.
    """
    if kind is not None:
        if kind not in ("exact", *offered):
            raise UserError(f"index {kind!r}: expected one of exact, {', '.join(offered)}")
        return IndexFacts(kind, f"asked for; {num_rows:,} rows")
    if num_rows < EXACT_BELOW:
        return IndexFacts("exact", f"{num_rows:,} rows, fewer than {EXACT_BELOW:,}")
    return IndexFacts(above, f"{num_rows:,} rows, {EXACT_BELOW:,} or more")


def best_first(hits: list[Hit]) -> list[Hit]:
    """Hits in the order in which every store gives them."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.key))
