"""A vector store in Qdrant: a collection on a server, or in qdrant-client's local mode (a folder, or memory).

The collection's metadata holds the facts. Qdrant's ids are UUIDs, and a row's id is the UUID of its key.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vlm2vec.errors import UserError, shown
from vlm2vec.retrieval.filters import absent_field, to_qdrant
from vlm2vec.retrieval.metadata import PLAIN_WORD, THUMBNAIL, clean_metadata, resolve_fields
from vlm2vec.retrieval.vector_store import (
    SCAN_ROWS,
    Hit,
    IndexFacts,
    Rows,
    StoreFacts,
    absent,
    best_first,
    choose_kind,
)

FACTS = "vlm2vec"
KEY = "key"
POINTS_AT_ONCE = 256
API_KEY = "QDRANT_API_KEY"  # pragma: allowlist secret
PORT = 6333
MIN_SERVER = "1.16"  # the first whose collections have metadata
KINDS = ("HNSW",)
INDEX_THRESHOLD_KB = 10_000
NAMESPACE = uuid.UUID("6c1f4b53-6a9e-4c0a-9f0e-0d6f2c1f5a77")


def open_qdrant(uri: str, create: StoreFacts | None) -> QdrantStore:
    """Opens the collection at `uri`; creates it if it is absent and `create` is given.

    Raises:
        UserError: if qdrant-client is not installed, the server does not answer, the collection is absent, or another
            program made it.
    """
    client, name = _connect(uri, create is not None)
    from qdrant_client import models

    with _server_errors(uri):
        if not client.collection_exists(name):
            if create is None:
                client.close()
                raise absent(uri)
            datatype = models.Datatype.FLOAT16 if create.precision == "float16" else models.Datatype.FLOAT32
            client.create_collection(
                name,
                vectors_config=models.VectorParams(
                    size=create.dim, distance=models.Distance.COSINE, datatype=datatype, on_disk=True
                ),
                optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0),  # exact until there are many rows
                metadata={FACTS: create.to_json()},
            )
        about = (client.get_collection(name).config.metadata or {}).get(FACTS)
    if about is None:
        client.close()
        raise UserError(
            f"{uri}: a collection that vlm2vec index did not make, or a server older than {MIN_SERVER}; "
            "choose another name"
        )
    return QdrantStore(uri, client, name, StoreFacts.from_json(about))


class QdrantStore:
    """See `vlm2vec.retrieval.vector_store.VectorStore`."""

    def __init__(self, uri: str, client: Any, name: str, facts: StoreFacts) -> None:
        from qdrant_client import models

        self.uri = uri
        self.facts = facts
        self._client = client
        self._name = name
        self._models = models
        self._known: set[str] = set()

    def count(self, where: str | None = None) -> int:
        """Number of rows, or of the rows that match a filter."""
        return int(self._ask("count", count_filter=self._filter(where), exact=True).count)

    def fields(self) -> dict[str, str]:
        """Fields of the metadata with their types, from the first rows: Qdrant has no schema."""
        kinds: dict[str, str] = {}
        points, _ = self._ask("scroll", limit=SCAN_ROWS, with_payload=True)
        for point in points:
            for field, value in (point.payload or {}).items():
                if value is not None and field != KEY:
                    kinds.setdefault(field, _kind(field, value))
        return kinds

    def upsert(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, or replaces rows of the same key."""
        points = [
            self._models.PointStruct(id=_point_id(key), vector=vector.tolist(), payload={**_payload(one), KEY: key})
            for key, vector, one in zip(keys, np.asarray(vectors_ND, dtype=np.float32), metadata, strict=True)
        ]
        for start in range(0, len(points), POINTS_AT_ONCE):
            self._ask("upsert", points[start : start + POINTS_AT_ONCE], wait=True)

    def add(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; Qdrant finds a point by its id, so this is `upsert`."""
        self.upsert(keys, vectors_ND, metadata)

    def delete(self, keys: Sequence[str]) -> None:
        """Removes rows; absent keys are ignored."""
        if keys:
            chosen = self._models.PointIdsList(points=[_point_id(key) for key in keys])
            self._ask("delete", points_selector=chosen, wait=True)

    def scan(
        self, fields: Sequence[str] | None = None, where: str | None = None, *, vectors: bool = False
    ) -> Iterator[Rows]:
        """All rows, or those that match a filter, in blocks."""
        place: Any = None
        while True:
            points, place = self._ask(
                "scroll",
                scroll_filter=self._filter(where),
                limit=SCAN_ROWS,
                offset=place,
                with_payload=self._selector(fields),
                with_vectors=vectors,
            )
            if points:
                yield _rows_of(points, vectors)
            if place is None:
                return

    def fetch(self, keys: Sequence[str], fields: Sequence[str] | None = None, *, vectors: bool = False) -> Rows:
        """The rows with these keys, in the order of `keys`; absent keys are left out."""
        points = self._ask(
            "retrieve",
            [_point_id(key) for key in keys],
            with_payload=self._selector(fields),
            with_vectors=vectors,
        )
        found = {point.payload[KEY]: point for point in points}
        return _rows_of([found[key] for key in keys if key in found], vectors)

    def search(self, vector_D: np.ndarray, k: int, where: str | None = None, *, exact: bool = False) -> list[Hit]:
        """The k nearest rows, best first."""
        points = self._ask(
            "query_points",
            query=np.asarray(vector_D, dtype=np.float32).tolist(),
            limit=k,
            query_filter=self._filter(where),
            with_payload=self._selector(None),
            search_params=self._models.SearchParams(exact=exact),
        ).points
        return best_first([Hit(point.payload.pop(KEY), point.score, point.payload) for point in points])

    def build_index(self, kind: str | None = None, *, unread: bool = False) -> IndexFacts:
        """Lets the server build its graph if there are many rows; it does so in the background."""
        chosen = choose_kind(self.count(), kind, above="HNSW", offered=KINDS)
        threshold = 0 if chosen.kind == "exact" else INDEX_THRESHOLD_KB
        self._ask(
            "update_collection", optimizers_config=self._models.OptimizersConfigDiff(indexing_threshold=threshold)
        )
        return chosen

    def close(self) -> None:
        """Closes the connection, or the local folder."""
        self._client.close()

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Calls the client on this collection."""
        with _server_errors(self.uri):
            return getattr(self._client, method)(self._name, *arguments, **named)

    def _filter(self, where: str | None) -> Any:
        """A SQL condition as Qdrant's filter; a field that no row has is an error, as in a database with a schema."""
        if not where:
            return None
        condition, fields = to_qdrant(resolve_fields(where, self._has, quote='"'))
        for field in fields:
            if field != KEY and not self._has(field):
                known = ", ".join(self.fields()) or "none"
                raise UserError(f"filter {shown(where)}: no row has {shown(field)}; metadata of {self.uri}: {known}")
        return condition

    def _has(self, field: str) -> bool:
        """Whether a row has the field; a field found once is not counted again."""
        if field not in self._known and field != KEY and PLAIN_WORD.fullmatch(field):  # no other name is kept
            there = self._models.Filter(must_not=[absent_field(field)])
            if self._ask("count", count_filter=there, exact=True).count:
                self._known.add(field)
        return field in self._known

    def _selector(self, fields: Sequence[str] | None) -> Any:
        if fields is None:
            return self._models.PayloadSelectorExclude(exclude=[THUMBNAIL])
        return self._models.PayloadSelectorInclude(include=[KEY, *fields])


def _connect(uri: str, make: bool) -> tuple[Any, str]:
    """The client for an address, and the name of the collection."""
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise UserError("a qdrant:// store needs qdrant-client: pip install 'vlm2vec[qdrant]'") from error
    expected = "expected qdrant://host:port/collection, qdrant:///folder/collection or qdrant://:memory:/collection"
    place, _, name = uri.removeprefix("qdrant://").partition("?")[0].rpartition("/")
    if not name or (not place and not uri.startswith("qdrant:///")):
        raise UserError(f"store {uri}: {expected}")
    if place == ":memory:":
        return QdrantClient(":memory:"), name
    if place.startswith(("/", ".")):
        if not make and not (Path(place) / "meta.json").is_file():
            raise absent(uri)
        try:
            return QdrantClient(path=place), name
        except RuntimeError as error:  # how its local mode says that the folder is locked
            raise UserError(
                f"{uri}: another process has it open; a folder can be open in one process at a time"
            ) from error
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port or PORT
    except ValueError as error:
        raise UserError(f"store {uri}: {expected}") from error
    secure = uri.partition("?")[2] == "https"
    key = os.environ.get(API_KEY)
    return QdrantClient(host=host, port=port, https=secure, api_key=key, check_compatibility=False), name


@contextmanager
def _server_errors(uri: str) -> Iterator[None]:
    """Turns the client's exceptions into one line."""
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    try:
        yield
    except ResponseHandlingException as error:
        raise UserError(f"{uri}: no Qdrant server answers there ({error})") from error
    except UnexpectedResponse as error:
        raise UserError(f"{uri}: the server refuses: {error.status_code} {error.reason_phrase}") from error
    except (ValueError, RuntimeError) as error:  # of the client, and of its local mode
        raise UserError(f"{uri}: Qdrant refuses this request ({' '.join(str(error).split())[:200]})") from error


def _payload(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as JSON; a thumbnail is base64."""
    clean = {name: value for name, value in clean_metadata(metadata).items() if value is not None}
    if isinstance(clean.get(THUMBNAIL), bytes):
        clean[THUMBNAIL] = base64.b64encode(clean[THUMBNAIL]).decode()
    return clean


def _rows_of(points: Sequence[Any], vectors: bool) -> Rows:
    metadata = [dict(point.payload) for point in points]
    keys = [one.pop(KEY) for one in metadata]
    for one in metadata:
        if one.get(THUMBNAIL):
            one[THUMBNAIL] = base64.b64decode(one[THUMBNAIL])
    vectors_ND = np.array([point.vector for point in points], dtype=np.float32) if vectors and points else None
    return Rows(keys, metadata, vectors_ND)


def _point_id(key: str) -> str:
    return str(uuid.uuid5(NAMESPACE, key))


def _kind(field: str, value: Any) -> str:
    if field == THUMBNAIL:
        return "bytes"
    return "truth" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"
