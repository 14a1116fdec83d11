"""Arrow tables of a LanceDB store: its schema, rows with metadata as columns, and columns back as metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.errors import UserError, shown
from vlm2vec.retrieval.metadata import RESERVED, as_text
from vlm2vec.retrieval.vector_store import Rows, StoreFacts

if TYPE_CHECKING:
    import pyarrow as pa

FACTS = b"vlm2vec"
"""Key of the store's facts in the metadata of its schema."""

PANICS = ("PanicException", "RustPanic")  # of the Rust code below LanceDB; the first is no subclass of Exception
OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def lance_errors(uri: str, where: str | None = None, fields: Iterable[str] = ()) -> Iterator[None]:
    """Turns what LanceDB raises into one line with the store; every call of LanceDB is inside of it.

    A write that fails is no commit, so the store keeps the rows that it had.

    Args:
        uri: The store.
        where: The filter of the call, and
        fields: the store's metadata, for the message.

    Raises:
        OSError: naming the store, if the disk is full, read-only or failing.
        UserError: for a filter that LanceDB refuses, or a store that it cannot read or write.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        found = OS_ERROR.search(str(error))
        if not isinstance(error, ValueError | RuntimeError | OSError | NotImplementedError):
            if type(error).__name__ not in PANICS:
                raise
        elif found:
            number = int(found[1])
            raise OSError(number, os.strerror(number), uri) from error
        line = first_line(error)
        if where is None or "Not found" in line:
            advice = "if it stays so, the store is damaged: index into a new one"
            raise UserError(f"{uri}: LanceDB cannot read or write this store ({line}); {advice}") from error
        names = ", ".join(fields) or "none"
        raise UserError(f"filter {shown(where)}: {line}; metadata of {uri}: {names}") from error


def first_line(error: BaseException) -> str:
    """Lance's message, without the place in its source and its own columns."""
    line = (str(error).splitlines() or [type(error).__name__])[0].split(", /")[0].split(". Valid fields")[0]
    for noise in ("lance error: ", "Invalid input, ", "Schema error: ", "Invalid user input: "):
        line = line.replace(noise, "")
    return line[:300]


def new_schema(facts: StoreFacts) -> pa.Schema:
    """The schema of an empty store, with its facts."""
    import pyarrow as pa

    number = pa.float16() if facts.precision == "float16" else pa.float32()
    fields = [pa.field("key", pa.string(), nullable=False), pa.field("vector", pa.list_(number, facts.dim))]
    return pa.schema(fields, metadata={FACTS: facts.to_json().encode()})


def rows_table(
    keys: Sequence[str], vectors_ND: np.ndarray, metadata: Mapping[str, list[Any]], schema: pa.Schema
) -> pa.Table:
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
            values = metadata.get(one.name)
            if values is not None and one.type == pa.string() and _types(values) != {str}:
                values = [value if value is None else as_text(value) for value in values]
            columns[one.name] = pa.nulls(len(keys), one.type) if values is None else pa.array(values, one.type)
    return pa.table(columns, schema=schema.remove_metadata())


def column_types(metadata: Mapping[str, list[Any]]) -> dict[str, pa.DataType]:
    """The column type of each field; fields without a value are left out, fields of several types are text."""
    import pyarrow as pa

    arrow = {bool: pa.bool_(), float: pa.float64(), bytes: pa.large_binary()}
    types = {}
    for name, values in metadata.items():
        # Numbers are float64, whole or not: Lance cannot change the type of a column of whole numbers later.
        found = {float if kind is int else kind for kind in _types(values)}
        if found:
            types[name] = arrow.get(found.pop(), pa.string()) if len(found) == 1 else pa.string()
    return types


def _types(values: list[Any]) -> set[type]:
    """The types of the values that are not None."""
    return set(map(type, values)) - {type(None)}


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
