"""The files of a finished part of an embedding job: parquet with the same columns in every part.

    key       name of the input
    version   changes when the input does
    vector    a list of fixed length
    metadata  JSON text

Inputs that could not be embedded have no row: their keys, versions and reasons are in the file's schema, beside the
facts of the vectors. So a folder of parts is a table that any reader of parquet takes as it is.

Shapes: N vectors, D embedding dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.files import replacing
from vlm2vec.jobs.records import Record
from vlm2vec.retrieval.metadata import clean_metadata, own
from vlm2vec.retrieval.vector_store import StoreFacts

FACTS, ERRORS = b"vlm2vec", b"errors"
"""Keys in the metadata of the schema."""
NAMES = "part-*.parquet"
Error = tuple[int, str, str, str]
"""Position among the part's inputs, key, version and reason."""


def part_name(number: int) -> str:
    """Name of the file of a part."""
    return f"part-{number:06d}.parquet"


def write_part(
    file: Path, records: Sequence[Record], vectors_ND: np.ndarray, reasons: Mapping[int, str], facts: StoreFacts
) -> None:
    """Writes a part atomically.

    Args:
        file: The file.
        records: All inputs of the part.
        vectors_ND: Vectors of the inputs that have one, in order.
        reasons: Why the others have none, by position.
        facts: Dimension and precision of the vectors, and what they depend on.
    """
    good = [record for position, record in enumerate(records) if position not in reasons]
    errors = [(i, records[i].key, records[i].version, reason) for i, reason in sorted(reasons.items())]
    number = np.float16 if facts.precision == "float16" else np.float32  # the other precisions need all parts
    flat = pa.array(np.ascontiguousarray(vectors_ND, number).reshape(-1))
    columns = {
        "key": pa.array([record.key for record in good], pa.string()),
        "version": pa.array([record.version for record in good], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(flat, facts.dim),
        "metadata": pa.array([json.dumps(_metadata(record), ensure_ascii=False) for record in good], pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({FACTS: facts.to_json(), ERRORS: json.dumps(errors)})
    with replacing(file) as beside:
        pq.write_table(table, beside)


def read_part(file: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a part."""
    return pq.read_table(file, columns=list(columns))


def errors_of(schema: pa.Schema) -> list[Error]:
    """The inputs of a part without a vector.

    Raises:
        KeyError: if another version wrote the file.
    """
    return [tuple(error) for error in json.loads((schema.metadata or {})[ERRORS])]


def facts_of_part(file: Path) -> StoreFacts:
    """What the vectors of a part depend on."""
    return StoreFacts.from_json(pq.read_schema(file).metadata[FACTS].decode())


def inputs_of(file: Path) -> list[tuple[str, str]]:
    """Key and version of every input of a part, in order, those without a vector included; [] for another version's."""
    table = read_part(file, ["key", "version"])
    if ERRORS not in (table.schema.metadata or {}):
        return []
    inputs = list(zip(table["key"].to_pylist(), table["version"].to_pylist(), strict=True))
    for position, key, version, _ in errors_of(table.schema):
        inputs.insert(position, (key, version))
    return inputs


def rows_of(file: Path, dim: int) -> tuple[list[str], np.ndarray, list[dict[str, Any]]]:
    """Keys, vectors in float32 and metadata of a part."""
    table = read_part(file, ["key", "vector", "metadata"])
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    metadata = [json.loads(text) for text in table["metadata"].to_pylist()]
    return table["key"].to_pylist(), flat.reshape(-1, dim).astype(np.float32, copy=False), metadata


def _metadata(record: Record) -> dict[str, Any]:
    text = record.item.text if record.item else None
    return clean_metadata({**(own(text=text) if text else {}), **record.metadata})
