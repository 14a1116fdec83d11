"""A vector store in LanceDB: one table in a folder on this machine or in an object store, without a server.

The table's schema holds the facts, so the folder can be moved as a whole. Each write is one commit of Lance: a killed
process leaves the commits before its last write, and nothing of that write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.errors import UserError, shown
from vlm2vec.retrieval.lance_tables import (
    FACTS,
    column_types,
    first_line,
    kind_of,
    lance_errors,
    new_schema,
    plain_row,
    rows_of,
    rows_table,
)
from vlm2vec.retrieval.metadata import RESERVED, THUMBNAIL, clean_columns, resolve_fields
from vlm2vec.retrieval.vector_store import (
    LANCE_ENDING,
    SCAN_ROWS,
    Hit,
    IndexFacts,
    Rows,
    StoreFacts,
    absent,
    best_first,
    choose_kind,
)

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # names of tables that LanceDB allows
ONLY_TABLE = "vectors"
WIDENED = "v2v_widened"
KEYS_AT_ONCE = 500
KINDS = ("IVF_RQ", "IVF_HNSW_SQ", "IVF_PQ")  # the first that can keep the dimension is the choice for many rows
RQ_DIVISOR = 8  # IVF_RQ keeps dimensions that are divisible by it
INDEX_NAME, KEY_INDEX = "vector_idx", "key_idx"
PARTITION_ROWS = 8192  # of IVF_RQ and IVF_PQ; building takes time in proportion to the number of partitions
PROBED_SHARE, MIN_PROBES = 0.5, 60  # partitions that a search reads: a share, so that recall does not fall with size
REFINE = 8  # an index's nearest 8 k are scored again with the stored vectors


def open_lance(uri: str, create: StoreFacts | None) -> LanceStore:
    """Opens the table at `uri`; creates it if it is absent and `create` is given.

    Raises:
        UserError: if LanceDB is not installed, the store is absent, or another program made the folder.
    """
    try:
        import lancedb
    except ImportError as error:
        raise UserError("a .lance store needs LanceDB: pip install 'vlm2vec[index]'") from error
    folder, name = _place(uri)
    there = "://" in uri or Path(uri).exists()
    empty = not there or (Path(uri).is_dir() and not any(Path(uri).iterdir()))
    if not there and create is None:
        raise absent(uri)
    with lance_errors(uri):
        database = lancedb.connect(folder)
    try:
        table = database.open_table(name)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        if create is None or ("://" not in uri and not empty):
            raise UserError(f"{uri}: not a LanceDB table ({first_line(error)})") from error
        with lance_errors(uri):
            table = database.create_table(name, schema=new_schema(create))
    with lance_errors(uri):
        about = (table.schema.metadata or {}).get(FACTS)
        if about is None:
            raise UserError(f"{uri}: a LanceDB table that vlm2vec index did not make; choose another --store")
        return LanceStore(uri, table, StoreFacts.from_json(about.decode()))


def _place(uri: str) -> tuple[str, str]:
    """Folder of a LanceDB database and the name of a table in it, which together are the store at `uri`.

    A name that LanceDB allows is the table's own: `photos.lance` is the table `photos` of its parent folder. Any other
    name, such as `my photos.lance`, is a folder with one table in it, and stays one if it is renamed.

    Raises:
        UserError: if the address has no name, or a table was given a name that LanceDB does not open.
    """
    parent, _, name = uri.rpartition("/")
    name = name.removesuffix(LANCE_ENDING)
    if not name.strip("."):
        raise UserError(f"store {uri}: expected a name before {LANCE_ENDING}")
    if not all(map(str.isprintable, name)):
        raise UserError(f"store {shown(uri)}: expected a name without control characters")
    is_folder = "://" not in uri and Path(uri, ONLY_TABLE + LANCE_ENDING).is_dir()
    if TABLE_NAME.fullmatch(name) and not is_folder:
        return parent or ".", name
    if "://" not in uri and Path(uri, "_versions").is_dir():
        raise UserError(
            f"{uri}: this store was created under another name, and LanceDB does not open it under this one; "
            "rename the folder: letters, digits, dots, - and _ only"
        )
    return uri, ONLY_TABLE


class LanceStore:
    """See `vlm2vec.retrieval.vector_store.VectorStore`."""

    def __init__(self, uri: str, table: Any, facts: StoreFacts) -> None:
        self.uri = uri
        self.facts = facts
        self._table = table
        self._probes = self._count_probes()

    def count(self, where: str | None = None) -> int:
        """Number of rows, or of the rows that match a filter."""
        with self._errors(where):
            return int(self._table.count_rows(self._resolved(where)))

    def fields(self) -> dict[str, str]:
        """Fields of the metadata with their types."""
        with lance_errors(self.uri):
            return {one.name: kind_of(one.type) for one in self._table.schema if not _internal(one.name)}

    def upsert(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, or replaces rows of the same key, in one commit."""
        if not keys:
            return
        with self._errors():
            merge = self._table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(self._rows(keys, vectors_ND, metadata))

    def add(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows whose keys are not in the store yet, in one commit that reads nothing.

        In an object store another process may have added the same rows meanwhile, so there this is `upsert`.
        """
        if "://" in self.uri:
            self.upsert(keys, vectors_ND, metadata)
        elif keys:
            with self._errors():
                self._table.add(self._rows(keys, vectors_ND, metadata))

    def _rows(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> pa.Table:
        """Returns rows as a table with the store's columns, after adding missing columns to the store."""
        columns = clean_columns(metadata)
        self._widen(columns)
        return rows_table(keys, np.asarray(vectors_ND), columns, self._table.schema)

    def delete(self, keys: Sequence[str]) -> None:
        """Removes rows; absent keys are ignored."""
        for start in range(0, len(keys), KEYS_AT_ONCE):
            with self._errors():
                self._table.delete(_among(keys[start : start + KEYS_AT_ONCE]))

    def scan(
        self, fields: Sequence[str] | None = None, where: str | None = None, *, vectors: bool = False
    ) -> Iterator[Rows]:
        """All rows, or those that match a filter, in blocks."""
        with self._errors(where):
            query = self._table.search().select(self._columns(fields, vectors))
            query = query.where(self._resolved(where)) if where else query
            for batch in query.to_batches(SCAN_ROWS):
                if batch.num_rows:
                    yield rows_of(batch)

    def fetch(self, keys: Sequence[str], fields: Sequence[str] | None = None, *, vectors: bool = False) -> Rows:
        """The rows with these keys, in the order of `keys`; absent keys are left out."""
        found: dict[str, tuple[dict[str, Any], np.ndarray | None]] = {}
        for start in range(0, len(keys), KEYS_AT_ONCE):
            for rows in self.scan(fields, _among(keys[start : start + KEYS_AT_ONCE]), vectors=vectors):
                for row, key in enumerate(rows.keys):
                    found[key] = (rows.metadata[row], None if rows.vectors_ND is None else rows.vectors_ND[row])
        here = [key for key in keys if key in found]
        vectors_ND = np.stack([found[key][1] for key in here]) if vectors and here else None  # type: ignore[misc]
        return Rows(here, [found[key][0] for key in here], vectors_ND)

    def search(self, vector_D: np.ndarray, k: int, where: str | None = None, *, exact: bool = False) -> list[Hit]:
        """The k nearest rows, best first; through the index if there is one, unless `exact`."""
        vector = np.asarray(vector_D, dtype=self.facts.precision)
        with self._errors(where):
            query = self._table.search(vector, vector_column_name="vector").distance_type("cosine").limit(k)
            query = query.select([*self._columns(None, vectors=False), "_distance"])
            query = query.where(self._resolved(where), prefilter=True) if where else query
            if self._probes:
                query = query.bypass_vector_index() if exact else query.nprobes(self._probes).refine_factor(REFINE)
            rows = query.to_list()
        return best_first([Hit(row.pop("key"), 1.0 - row.pop("_distance"), plain_row(row)) for row in rows])

    def build_index(self, kind: str | None = None, *, unread: bool = False) -> IndexFacts:
        """Builds the index that suits the number of rows, and merges the small files of many writes.

        Processes that read the store need the files before the merge, so these stay for a day unless it is `unread`.

        Raises:
            UserError: for an unknown kind, or one that does not support this dimension.
        """
        offered = KINDS if self.facts.dim % RQ_DIVISOR == 0 else KINDS[1:]
        chosen = choose_kind(self.count(), kind, above=offered[0], offered=offered)
        with self._errors():
            if chosen.kind != "exact":
                self._index_keys()
            self._table.optimize(cleanup_older_than=timedelta(milliseconds=1) if unread else timedelta(days=1))
            if self._probes and chosen.kind == "exact":
                self._table.drop_index(INDEX_NAME)
            elif chosen.kind != "exact" and self._index_kind() != chosen.kind:
                config = _index_config(chosen.kind, self.count())
                self._table.create_index("vector", config=config, replace=True, name=INDEX_NAME)
            self._probes = self._count_probes()
        return chosen

    def close(self) -> None:
        """Does nothing: no file is open between calls."""

    def _index_keys(self) -> None:
        """Indexes the keys, so that fetching and replacing rows by key does not read every key."""
        from lancedb.index import BTree

        if not any(index.name == KEY_INDEX for index in self._table.list_indices()):
            self._table.create_index("key", config=BTree(), name=KEY_INDEX)

    def _count_probes(self) -> int:
        """Returns the number of partitions that a search reads; 0 without an index."""
        if not any(index.name == INDEX_NAME for index in self._table.list_indices()):
            return 0
        stats = self._table.index_stats(INDEX_NAME)
        partitions = _num_partitions(stats.num_indexed_rows if stats is not None else 0)
        return max(MIN_PROBES, math.ceil(PROBED_SHARE * partitions))

    def _index_kind(self) -> str | None:
        """Returns the kind of the existing index; `optimize` adds later rows to it."""
        stats = self._table.index_stats(INDEX_NAME) if self._probes else None
        return str(stats.index_type).upper() if stats is not None else None

    def _columns(self, fields: Sequence[str] | None, vectors: bool) -> list[str]:
        known = self.fields()
        chosen = [name for name in known if name != THUMBNAIL] if fields is None else [f for f in fields if f in known]
        return ["key", *chosen, *(["vector"] if vectors else [])]

    def _resolved(self, where: str | None) -> str | None:
        if not where:
            return None
        return resolve_fields(where, self.fields().__contains__, quote="`")

    def _widen(self, columns: Mapping[str, list[Any]]) -> None:
        """Adds a column for each new field, and makes a column text where a value of another type arrives."""
        import pyarrow as pa

        self._finish_widening()
        there = {one.name: one.type for one in self._table.schema}
        wanted = column_types(columns)
        new = [pa.field(name, kind) for name, kind in wanted.items() if name not in there]
        if new:
            self._table.add_columns(new)
        for name, kind in wanted.items():
            if name in there and there[name] not in (kind, pa.string()):
                self._make_text(name)

    def _make_text(self, name: str) -> None:
        """Replaces a column by its values as text, in three commits; see `_finish_widening`."""
        text = f"CAST(`{name}` AS STRING)"
        self._table.add_columns({f"{WIDENED}_{name}": f"regexp_replace({text}, '[.]0$', '')"})
        self._table.drop_columns([name])
        self._table.alter_columns({"path": f"{WIDENED}_{name}", "rename": name})

    def _finish_widening(self) -> None:
        """Completes or reverts a change of type that was interrupted."""
        names = self._table.schema.names
        for name in names:
            if name.startswith(f"{WIDENED}_"):
                before = name.removeprefix(f"{WIDENED}_")
                if before in names:
                    self._table.drop_columns([name])
                else:
                    self._table.alter_columns({"path": name, "rename": before})

    def _errors(self, where: str | None = None) -> AbstractContextManager[None]:
        return lance_errors(self.uri, where, self.fields() if where else ())


def _internal(name: str) -> bool:
    """Whether a column is not metadata."""
    return name in RESERVED or name.startswith(WIDENED)


def _index_config(kind: str, num_rows: int) -> Any:
    from lancedb.index import HnswSq, IvfPq, IvfRq

    if kind == "IVF_HNSW_SQ":
        return HnswSq(distance_type="cosine")
    build = {"IVF_PQ": IvfPq, "IVF_RQ": IvfRq}[kind]
    return build(distance_type="cosine", num_partitions=_num_partitions(num_rows))


def _num_partitions(num_rows: int) -> int:
    """Partitions of an index of IVF_RQ or IVF_PQ."""
    return max(1, num_rows // PARTITION_ROWS)


def _among(keys: Sequence[str]) -> str:
    """A filter for these keys."""
    quoted = ", ".join("'" + key.replace("'", "''") + "'" for key in keys)
    return f"key IN ({quoted})"
