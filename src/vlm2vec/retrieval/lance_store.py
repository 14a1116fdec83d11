"""A store in LanceDB: one table, a folder on this machine or in an object store; no server.

The table's schema holds the facts, so a store moves as one folder. Every write is one commit of Lance: a process that
is killed leaves the commits before it and nothing of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.retrieval.vector_store import (
    IMAGE,
    LANCE_ENDING,
    RESERVED,
    SCAN_ROWS,
    Hit,
    IndexFacts,
    Rows,
    StoreFacts,
    absent,
    best_first,
    choose_kind,
    clean_metadata,
)

if TYPE_CHECKING:
    import pyarrow as pa

FACTS = b"vlm2vec"
KEYS_AT_ONCE = 500
KINDS = ("IVF_RQ", "IVF_HNSW_SQ", "IVF_PQ")  # the first that can keep the dimension is the choice for many rows
RQ_DIVISOR = 8  # IVF_RQ keeps dimensions that are divisible by it
INDEX_NAME = "vector_idx"
PROBES = 60  # partitions of an index that are looked at, where it has so many
REFINE = 8  # an index's nearest 8 k are scored again by the kept vectors


def open_lance(uri: str, create: StoreFacts | None) -> LanceStore:
    """Opens the table at `uri`, or makes it where `create` is given.

    Raises:
        UserError: if LanceDB is not installed, the store is absent, or the folder is no store of ours.
    """
    try:
        import lancedb
    except ImportError as error:
        raise UserError("a .lance store needs LanceDB: pip install 'vlm2vec[index]'") from error
    parent, _, name = uri.rpartition("/")
    name = name.removesuffix(LANCE_ENDING)
    if not name:
        raise UserError(f"store {uri!r}: expected a name before {LANCE_ENDING}")
    there = "://" in uri or Path(uri).exists()
    if not there and create is None:
        raise absent(uri)
    database = lancedb.connect(parent or ".")
    try:
        table = database.open_table(name)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        if create is None or ("://" not in uri and Path(uri).exists()):
            raise UserError(f"{uri}: not a LanceDB table ({_first_line(error)})") from error
        table = database.create_table(name, schema=_new_schema(create))
    about = (table.schema.metadata or {}).get(FACTS)
    if about is None:
        raise UserError(f"{uri}: a LanceDB table that vlm2vec index did not make; choose another --store")
    return LanceStore(uri, table, StoreFacts.from_json(about.decode()))


class LanceStore:
    """See `vlm2vec.retrieval.vector_store.VectorStore`."""

    def __init__(self, uri: str, table: Any, facts: StoreFacts) -> None:
        self.uri = uri
        self.facts = facts
        self._table = table
        self._indexed = any(index.name == INDEX_NAME for index in table.list_indices())

    def count(self, where: str | None = None) -> int:
        """Rows, all or those of a filter."""
        with self._filter_errors(where):
            return int(self._table.count_rows(where))

    def fields(self) -> dict[str, str]:
        """Names of the metadata, and what each is."""
        return {one.name: _kind(one.type) for one in self._table.schema if one.name not in RESERVED}

    def upsert(self, keys: Sequence[str], vectors_ND: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, or replaces those whose key is there, in one commit."""
        if not keys:
            return
        rows = [clean_metadata(one) for one in metadata]
        self._widen(rows)
        schema = self._table.schema
        table = _rows_table(keys, np.asarray(vectors_ND), rows, schema)
        merge = self._table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(table)

    def delete(self, keys: Sequence[str]) -> None:
        """Removes rows; absent keys are passed over."""
        for start in range(0, len(keys), KEYS_AT_ONCE):
            self._table.delete(_among(keys[start : start + KEYS_AT_ONCE]))

    def scan(
        self, fields: Sequence[str] | None = None, where: str | None = None, *, vectors: bool = False
    ) -> Iterator[Rows]:
        """All rows, or those of a filter, in blocks."""
        query = self._table.search().select(self._columns(fields, vectors))
        query = query.where(where) if where else query
        with self._filter_errors(where):
            for batch in query.to_batches(SCAN_ROWS):
                if batch.num_rows:
                    yield _rows_of(batch)

    def fetch(self, keys: Sequence[str], fields: Sequence[str] | None = None, *, vectors: bool = False) -> Rows:
        """The rows of these keys that are there, in the order of `keys`."""
        found: dict[str, tuple[dict[str, Any], np.ndarray | None]] = {}
        for start in range(0, len(keys), KEYS_AT_ONCE):
            for rows in self.scan(fields, _among(keys[start : start + KEYS_AT_ONCE]), vectors=vectors):
                for row, key in enumerate(rows.keys):
                    found[key] = (rows.metadata[row], None if rows.vectors_ND is None else rows.vectors_ND[row])
        here = [key for key in keys if key in found]
        vectors_ND = np.stack([found[key][1] for key in here]) if vectors and here else None  # type: ignore[misc]
        return Rows(here, [found[key][0] for key in here], vectors_ND)

    def search(self, vector_D: np.ndarray, k: int, where: str | None = None, *, exact: bool = False) -> list[Hit]:
        """The k nearest rows, best first; through the index where there is one, unless `exact`."""
        vector = np.asarray(vector_D, dtype=self.facts.precision)
        query = self._table.search(vector, vector_column_name="vector").distance_type("cosine").limit(k)
        query = query.select([*self._columns(None, vectors=False), "_distance"])
        query = query.where(where, prefilter=True) if where else query
        if self._indexed:
            query = query.bypass_vector_index() if exact else query.nprobes(PROBES).refine_factor(REFINE)
        with self._filter_errors(where):
            rows = query.to_list()
        return best_first([Hit(row.pop("key"), 1.0 - row.pop("_distance"), _whole(row)) for row in rows])

    def build_index(self, kind: str | None = None) -> IndexFacts:
        """Builds the index that suits the number of rows, and merges the small files that many writes leave.

        Raises:
            UserError: for a kind that there is not, or that cannot keep this dimension.
        """
        offered = KINDS if self.facts.dim % RQ_DIVISOR == 0 else KINDS[1:]
        chosen = choose_kind(self.count(), kind, above=offered[0], offered=offered)
        self._table.optimize(cleanup_older_than=timedelta(days=1))
        if self._indexed and chosen.kind == "exact":
            self._table.drop_index(INDEX_NAME)
            self._indexed = False
        elif chosen.kind != "exact" and self._index_kind() != chosen.kind:
            self._table.create_index("vector", config=_index_config(chosen.kind), replace=True, name=INDEX_NAME)
            self._indexed = True
        return chosen

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _index_kind(self) -> str | None:
        """The kind of the index that is there; rows that came later were added to it by `optimize`."""
        stats = self._table.index_stats(INDEX_NAME) if self._indexed else None
        return str(stats.index_type).upper() if stats is not None else None

    def _columns(self, fields: Sequence[str] | None, vectors: bool) -> list[str]:
        known = self.fields()
        chosen = [name for name in known if name != IMAGE] if fields is None else [f for f in fields if f in known]
        return ["key", *chosen, *(["vector"] if vectors else [])]

    def _widen(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Makes a column for every metadata name that is new.

        Raises:
            UserError: for a value that does not fit the column that is there.
        """
        import pyarrow as pa

        there = {one.name: one.type for one in self._table.schema}
        new: list[pa.Field] = []
        for name, wanted in _types_of(rows).items():
            have = there.get(name)
            if have is None:
                new.append(pa.field(name, wanted))
            elif have not in (wanted, pa.string()):
                raise UserError(f"{self.uri}: metadata {name!r} is {_kind(have)} there; a new row has {_kind(wanted)}")
        if new:
            self._table.add_columns(new)

    @contextmanager
    def _filter_errors(self, where: str | None) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            if where is None:
                raise
            fields = ", ".join(self.fields()) or "none"
            raise UserError(f"filter {where!r}: {_first_line(error)}; metadata of {self.uri}: {fields}") from error


def _new_schema(facts: StoreFacts) -> pa.Schema:
    import pyarrow as pa

    number = pa.float16() if facts.precision == "float16" else pa.float32()
    fields = [pa.field("key", pa.string(), nullable=False), pa.field("vector", pa.list_(number, facts.dim))]
    return pa.schema(fields, metadata={FACTS: facts.to_json().encode()})


def _rows_table(keys: Sequence[str], vectors_ND: np.ndarray, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """An Arrow table in the store's schema; absent metadata is null, anything in a text column is text."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for one in schema:
        if one.name == "key":
            columns["key"] = pa.array(keys, one.type)
        elif one.name == "vector":
            flat = np.ascontiguousarray(vectors_ND, dtype=one.type.value_type.to_pandas_dtype()).ravel()
            columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), one.type.list_size)
        else:
            values = [row.get(one.name) for row in rows]
            if one.type == pa.string():
                values = [value if value is None else str(value) for value in values]
            columns[one.name] = pa.array(values, one.type)
    return pa.table(columns, schema=schema.remove_metadata())


def _types_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """The column type of every metadata name; names whose values are all absent are left out."""
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                # Numbers are float64, whole or not: Lance cannot make a column of whole numbers one of others later.
                kinds.setdefault(name, set()).add(float if type(value) is int else type(value))
    arrow = {bool: pa.bool_(), float: pa.float64(), bytes: pa.large_binary()}
    return {
        name: arrow.get(found.pop(), pa.string()) if len(found) == 1 else pa.string() for name, found in kinds.items()
    }


def _rows_of(batch: pa.RecordBatch) -> Rows:
    vectors_ND = None
    names = batch.schema.names
    if "vector" in names:
        column = batch.column("vector")
        vectors_ND = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
    metadata = batch.select([name for name in names if name not in RESERVED])
    rows = metadata.to_pylist() if metadata.num_columns else [{} for _ in range(batch.num_rows)]
    return Rows(batch.column("key").to_pylist(), [_whole(row) for row in rows], vectors_ND)


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers as such, as they came; what is absent is left out."""
    there = {name: value for name, value in row.items() if value is not None}
    return {name: int(x) if isinstance(x, float) and x.is_integer() else x for name, x in there.items()}


def _index_config(kind: str) -> Any:
    from lancedb.index import HnswSq, IvfPq, IvfRq

    return {"IVF_PQ": IvfPq, "IVF_HNSW_SQ": HnswSq, "IVF_RQ": IvfRq}[kind](distance_type="cosine")


def _kind(type_: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_boolean(type_):
        return "truth"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    return "bytes" if pa.types.is_large_binary(type_) or pa.types.is_binary(type_) else "text"


def _among(keys: Sequence[str]) -> str:
    """A filter for these keys."""
    quoted = ", ".join("'" + key.replace("'", "''") + "'" for key in keys)
    return f"key IN ({quoted})"


def _first_line(error: Exception) -> str:
    """What Lance says, without where in its own source it says it and without its own columns."""
    line = str(error).splitlines()[0].split(", /")[0].split(". Valid fields")[0]
    for noise in ("lance error: ", "Invalid input, ", "Schema error: ", "Invalid user input: "):
        line = line.replace(noise, "")
    return line
