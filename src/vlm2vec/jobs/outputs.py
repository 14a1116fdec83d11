"""Output files of an embedding job, made from its parts; each file appears in one rename.

    .parquet  key, vector (a list of fixed length), and a column for every field of metadata
    .npy      an array [N, D]; `NAME.rows.jsonl` beside it has key and metadata of each row
    .lance    a vector store for `vlm2vec search`

The output without an ending is the folder of the parts (`vlm2vec.jobs.parts`), which nothing joins.

Shapes: N vectors, D embedding dim.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.jobs.parts import rows_of
from vlm2vec.quantize import PRECISIONS, dtype, quantize, width
from vlm2vec.retrieval.metadata import as_text
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts

PARTS = ""
"""Ending of an output that is a folder of parts."""
FLOATS = ("float32", "float16")
FORMATS: dict[str, tuple[str, ...]] = {".parquet": PRECISIONS, ".npy": PRECISIONS, ".lance": FLOATS, PARTS: FLOATS}
"""File endings, and the precisions that each supports."""

Parts = Callable[[], Iterator[tuple[list[str], np.ndarray, list[dict[str, Any]]]]]


def write_output(output: Path, files: Sequence[Path], facts: StoreFacts, folder: Path) -> None:
    """Joins the parts.

    Args:
        output: The file; its ending selects the format. An existing file is replaced.
        files: Finished parts with at least one vector.
        facts: Dimension and precision of the vectors, and what they depend on; stored with them.
        folder: Folder for temporary files, on the same disk.
    """
    ranges = _ranges(files, facts.dim) if facts.precision.endswith("int8") else None

    def parts() -> Iterator[tuple[list[str], np.ndarray, list[dict[str, Any]]]]:
        for file in files:
            keys, vectors_ND, metadata = rows_of(file, facts.dim)
            if keys:
                yield keys, quantize(vectors_ND, facts.precision, ranges), metadata

    write = {".parquet": _write_parquet, ".npy": _write_array, ".lance": _write_store}[output.suffix]
    write(output, parts, facts, folder)


def _ranges(files: Sequence[Path], dim: int) -> np.ndarray:
    """Smallest and largest value of each dimension of all vectors, [2, D]."""
    lowest, highest = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
    for file in files:
        _, vectors_ND, _ = rows_of(file, dim)
        if len(vectors_ND):
            lowest = np.minimum(lowest, vectors_ND.min(axis=0))
            highest = np.maximum(highest, vectors_ND.max(axis=0))
    return np.stack([lowest, highest])


def _write_parquet(output: Path, parts: Parts, facts: StoreFacts, folder: Path) -> None:
    columns = _column_types(parts)
    numbers = pa.from_numpy_dtype(dtype(facts.precision))
    schema = pa.schema(
        [("key", pa.string()), ("vector", pa.list_(numbers, width(facts.dim, facts.precision))), *columns.items()],
        metadata={"vlm2vec": facts.to_json()},
    )
    beside = folder / output.name
    with pq.ParquetWriter(beside, schema) as writer:
        for keys, vectors, metadata in parts():
            flat = pa.array(vectors.reshape(-1))
            arrays = [pa.array(keys), pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])]
            for name, kind in columns.items():
                arrays.append(pa.array([_as(row.get(name), kind) for row in metadata], kind))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    beside.replace(output)


def _write_array(output: Path, parts: Parts, facts: StoreFacts, folder: Path) -> None:
    count = sum(len(keys) for keys, _, _ in parts())
    rows = output.with_suffix(".rows.jsonl")
    beside, beside_rows = folder / output.name, folder / rows.name
    shape = (count, width(facts.dim, facts.precision))
    array = np.lib.format.open_memmap(beside, mode="w+", dtype=dtype(facts.precision), shape=shape)
    begin = 0
    with beside_rows.open("w", encoding="utf-8") as lines:
        for keys, vectors, metadata in parts():
            array[begin : begin + len(keys)] = vectors
            begin += len(keys)
            for key, row in zip(keys, metadata, strict=True):
                lines.write(json.dumps({"key": key, **row}, ensure_ascii=False) + "\n")
    array.flush()
    beside_rows.replace(rows)
    beside.replace(output)  # last: where the array is, everything is


def _write_store(output: Path, parts: Parts, facts: StoreFacts, folder: Path) -> None:
    beside = folder / output.name
    if beside.exists():  # of a run that was killed here
        shutil.rmtree(beside)
    store = open_store(str(beside), create=facts)
    for keys, vectors, metadata in parts():
        store.add(keys, vectors, metadata)
    store.build_index(unread=True)
    store.close()
    if output.exists():
        shutil.rmtree(output)
    beside.replace(output)


def _column_types(parts: Parts) -> dict[str, pa.DataType]:
    """The type of each field; a field with values of several types is text."""
    kinds: dict[str, set[type]] = {}
    for _, _, metadata in parts():
        for row in metadata:
            for name, value in row.items():
                kinds.setdefault(name, set())
                if value is not None:
                    kinds[name].add(type(value))
    return {name: _column_type(found) for name, found in kinds.items()}


def _column_type(kinds: set[type]) -> pa.DataType:
    plain = {frozenset({bool}): pa.bool_(), frozenset({int}): pa.int64()}
    if kinds and kinds <= {int, float} and float in kinds:
        return pa.float64()
    return plain.get(frozenset(kinds), pa.string())


def _as(value: Any, kind: pa.DataType) -> Any:
    return as_text(value) if value is not None and kind == pa.string() else value
