"""Arrow tables of a LanceDB store: its schema, rows with metadata as columns, and columns back as metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.retrieval.metadata import RESERVED, as_text
from vlm2vec.retrieval.vector_store import Rows, StoreFacts

if TYPE_CHECKING:
    import pyarrow as pa

FACTS = b"vlm2vec"
"""Key of the store's facts in the metadata of its schema."""

OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(uri: str) -> Iterator[None]:
    """Turns a `RuntimeError` of Lance about the disk (full, read-only) into an `OSError` that names the store.

    A write that fails is no commit, so the store keeps the rows that it had.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        found = OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), uri) from error


def new_schema(facts: StoreFacts) -> pa.Schema:
    """The schema of an empty store, with its facts."""
    import pyarrow as pa

    number = pa.float16() if facts.precision == "float16" else pa.float32()
    fields = [pa.field("key", pa.string(), nullable=False), pa.field("vector", pa.list_(number, facts.dim))]
    return pa.schema(fields, metadata={FACTS: facts.to_json().encode()})


def rows_table(keys: Sequence[str], vectors_ND: np.ndarray, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """An Arrow table in the store's schema; absent metadata is null."""
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
                values = [value if value is None else as_text(value) for value in values]
            columns[one.name] = pa.array(values, one.type)
    return pa.table(columns, schema=schema.remove_metadata())


def column_types(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """The column type of each field; fields without a value are left out, fields of several types are text."""
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                # Numbers are float64, whole or not: Lance cannot change the type of a column of whole numbers later.
                kinds.setdefault(name, set()).add(float if type(value) is int else type(value))
    arrow = {bool: pa.bool_(), float: pa.float64(), bytes: pa.large_binary()}
    return {
        name: arrow.get(found.pop(), pa.string()) if len(found) == 1 else pa.string() for name, found in kinds.items()
    }


def rows_of(batch: pa.RecordBatch) -> Rows:
    """Rows with metadata as dictionaries."""
    vectors_ND = None
    names = batch.schema.names
    if "vector" in names:
        column = batch.column("vector")
        vectors_ND = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
    metadata = batch.select([name for name in names if name not in RESERVED])
    rows = metadata.to_pylist() if metadata.num_columns else [{} for _ in range(batch.num_rows)]
    return Rows(batch.column("key").to_pylist(), [plain_row(row) for row in rows], vectors_ND)


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Metadata without absent fields; whole numbers are int."""
    there = {name: value for name, value in row.items() if value is not None}
    return {name: int(x) if isinstance(x, float) and x.is_integer() else x for name, x in there.items()}


def kind_of(type_: pa.DataType) -> str:
    """Name of a column's type: "text", "number", "truth" or "bytes"."""
    import pyarrow as pa

    if pa.types.is_boolean(type_):
        return "truth"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    return "bytes" if pa.types.is_large_binary(type_) or pa.types.is_binary(type_) else "text"
