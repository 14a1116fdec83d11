"""Rows of JSON lines, CSV and parquet files as inputs.

A row has `text`, an image, or both, and maybe `instruction`; every other column is metadata. Images are paths
relative to the table, lists of such paths, or, in parquet, cells of bytes or of the hub's Image type. The columns are
found by name: text among `TEXT_NAMES`, images among `IMAGE_NAMES`, the row's key among `KEY_NAMES` (without one, the
row's number is its key).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.errors import UserError
from vlm2vec.jobs.records import Record, SourceSettings, row_version
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput

TEXT_NAMES = ("text", "caption", "document", "query", "content", "title")
IMAGE_NAMES = ("image", "images", "image_path", "img_path", "file_name", "filename", "filepath", "path", "picture")
KEY_NAMES = ("key", "id", "_id")
Row = tuple[int, dict[str, Any] | str]


def read_table(path: Path, prefix: str, settings: SourceSettings) -> Iterator[Record]:
    """Records of a table; a row that is no input is one with an error.

    Args:
        path: The file.
        prefix: Put before the keys.
        settings: Names of columns, where they are not to be found by name.

    Raises:
        UserError: if the file cannot be read as such a table, or has no column of texts or images.
    """
    read = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()]
    columns: _Columns | None = None
    for number, row in read(path):
        if isinstance(row, str):
            yield Record(f"{prefix}{number}", None, {"path": str(path)}, "", f"{path}, row {number}: {row}")
            continue
        if columns is None or path.suffix.lower() == ".jsonl":  # there, each row may have fields of its own
            columns = _Columns(row, settings)
        yield columns.record(row, path, number, prefix)


class _Columns:
    """Which columns of a table are what."""

    def __init__(self, names: Iterable[str], settings: SourceSettings) -> None:
        self.text = _choose(names, settings.text_column, TEXT_NAMES)
        self.image = _choose(names, settings.image_column, IMAGE_NAMES)
        self.key = _choose(names, settings.key_column, KEY_NAMES)

    def record(self, row: dict[str, Any], path: Path, number: int, prefix: str) -> Record:
        """The record of a row."""
        own = row.get(self.key) if self.key else None
        key = f"{prefix}{number if own in (None, '') else own}"
        used = {self.text, self.image, self.key, "instruction"}
        others = {name: value for name, value in row.items() if name not in used}
        about = {**others, "path": str(path), "kind": "row", "row": number}
        where = f"{path}, row {number}"
        try:
            item = self._input(row, path, where)
        except UserError as error:
            return Record(key, None, about, "", f"{where}: {error}")
        version = row_version(json.dumps([item.text, item.instruction, others], default=str), item.images)
        return Record(key, item, about, version)

    def _input(self, row: dict[str, Any], path: Path, where: str) -> EmbeddingInput:
        text = row.get(self.text) if self.text else None
        if text is not None and not isinstance(text, str):
            raise UserError(f"column {self.text}: expected a text, found {text!r}")
        value = row.get(self.image) if self.image else None
        cells = value if isinstance(value, list) else [value]
        images = tuple(_image(cell, path, where) for cell in cells if cell not in (None, ""))
        if not text and not images:
            tried = " or ".join(filter(None, (self.text, self.image)))
            sought = f"one of {', '.join(TEXT_NAMES)}, or of {', '.join(IMAGE_NAMES)}"
            raise UserError(f"nothing in {tried}" if tried else f"no column of texts or pictures; expected {sought}")
        return EmbeddingInput(text or None, images, row.get("instruction") or None)


def _choose(names: Iterable[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    there = list(names)
    if wanted is not None and wanted not in there:
        raise UserError(f"no column {wanted!r}; there are: {', '.join(there)}")
    return wanted or next((name for name in usual if name in there), None)


def _image(cell: Any, path: Path, where: str) -> ImageRef:
    if isinstance(cell, ImageRef):
        return cell
    if not isinstance(cell, str):
        raise UserError(f"expected the path of a picture, found {cell!r}")
    if cell.startswith(("data:", "http://", "https://")):
        return ImageRef.of(cell)
    return ImageRef(path=str(path.parent / cell), origin=where)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"not JSON ({error})"
                continue
            yield number, row if isinstance(row, dict) else f"expected an object, found {line.strip()[:60]}"


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines)
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():  # more or fewer cells than the header has
                yield number, f"expected {len(rows.fieldnames or ())} cells"
                continue
            yield number, dict(row)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error
    cells = [field.name for field in file.schema_arrow if _holds_images(field.type)]
    plain = [name for name in file.schema_arrow.names if name not in cells]
    number = 0
    for batch in file.iter_batches(columns=[*plain, *_with_gaps(file, cells)], batch_size=256):
        rows = batch.select(plain).to_pylist() if plain else [{} for _ in range(batch.num_rows)]
        gaps = {name: batch.column(name).is_null().to_pylist() for name in cells if name in batch.schema.names}
        for i, row in enumerate(rows):
            # Cells are read when they are encoded; the archive that they lie in is the table.
            images = {name: ImageRef(str(path), f"{name}[{number}]") for name in cells}
            images |= {name: None for name, empty in gaps.items() if empty[i]}
            yield number, {**row, **images}
            number += 1


def _with_gaps(file: pq.ParquetFile, cells: list[str]) -> list[str]:
    """Columns of images that may have empty cells; only these are read to list the rows."""
    full = set(cells)
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        for place in range(about.num_columns):
            column = about.column(place)
            counted = column.statistics is not None and column.statistics.null_count == 0
            if not counted and not column.path_in_schema.endswith(".path"):
                full.discard(column.path_in_schema.partition(".")[0])
    return [name for name in cells if name not in full]


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes"}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
