"""Rows of JSON lines, CSV and parquet files as inputs.

A row has a text, an image or both, and optionally `instruction`; every other column is metadata. Images are paths
relative to the table, lists of such paths, or, in parquet, cells of bytes or of the hub's Image type. Columns are found
by name: the text among `TEXT_NAMES`, the image among `IMAGE_NAMES`, the row's key among `KEY_NAMES`. A row without a
key has its number as key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError, shown
from vlm2vec.jobs.records import Record, SourceSettings, row_version
from vlm2vec.media.cells import columns_to_read, image_columns, images_of_rows, open_parquet, parquet_errors, plain_rows
from vlm2vec.media.delimited import delimited_rows
from vlm2vec.media.images import ImageRef, image_beside
from vlm2vec.media.text import ENCODING, SURROGATE, parse_json, printable, read_lines, require_unicode
from vlm2vec.retrieval.metadata import PREFIX, column_name, own, plain_value, renamed_columns
from vlm2vec.types import EmbeddingInput

TEXT_NAMES = ("text", "caption", "document", "query", "content", "title")
IMAGE_NAMES = ("image", "images", "image_path", "img_path", "file_name", "filename", "filepath", "path", "picture")
KEY_NAMES = ("key", "id", "_id")
ROW = f"{PREFIX}row"
Row = tuple[int, dict[str, Any] | str]


def read_table(
    path: Path, prefix: str, settings: SourceSettings, renamed: dict[str, str] | None = None
) -> Iterator[Record]:
    """Records of a table; a row that is not a valid input is a record with an error.

    Args:
        path: The file.
        prefix: Prepended to the keys.
        settings: Names of columns that are not to be found by name, and the encoding.
        renamed: Receives the columns that are kept under another name.

    Raises:
        UserError: if the file is not a table of its kind, or has no column of texts or images.
    """
    ending = path.suffix.lower()
    read = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[ending]
    columns: _Columns | None = None
    for number, row in read(path, settings.encoding):
        if isinstance(row, str):
            where = own(path=printable(str(path)), kind="row", row=number)
            yield Record(f"{prefix}{number}", None, where, "", printable(f"{path}, row {number}: {row}"))
            continue
        if columns is None or not columns.fit(row):  # rows of JSON lines may have fields of their own
            columns = _Columns(row, path, settings)
            if renamed is not None:
                renamed.update(renamed_columns(dict.fromkeys(columns.others)))
        yield columns.record(row, number, prefix)


class _Columns:
    """The meaning of each column of a table."""

    def __init__(self, row: dict[str, Any], path: Path, settings: SourceSettings) -> None:
        self.path, self.where = path, f"{path}, row"
        self.about = own(path=printable(str(path)), kind="row")
        self.names = set(row)
        self.text = _choose(row, settings.text_column, TEXT_NAMES)
        self.image = _choose(row, settings.image_column, IMAGE_NAMES)
        self.key = _choose(row, settings.key_column, KEY_NAMES)
        used = {self.text, self.image, self.key, "instruction"}
        self.others = {name: column_name(name) for name in row if name not in used}

    def fit(self, row: dict[str, Any]) -> bool:
        """Whether a row has these columns."""
        return row.keys() == self.names

    def record(self, row: dict[str, Any], number: int, prefix: str) -> Record:
        """The record of a row."""
        own_key = row.get(self.key) if self.key else None
        unnamed = own_key in (None, "") or isinstance(own_key, list)  # a list: bytes, which are read as images
        key = printable(f"{prefix}{number if unnamed else own_key}")
        others = {column: plain_value(_named(row[name])) for name, column in self.others.items()}
        about = {**others, **self.about, ROW: number}
        where = f"{self.where} {number}"
        try:
            item = self._input(row, where)
        except UserError as error:
            return Record(key, None, about, "", printable(f"{where}: {error}"))
        version = row_version(json.dumps([item.text, item.instruction, others]), item.images)
        return Record(key, item, about, version)

    def _input(self, row: dict[str, Any], where: str) -> EmbeddingInput:
        text = _text(row, self.text)
        value = row.get(self.image) if self.image else None
        cells = value if isinstance(value, list) else [] if value is None else [value]
        images = tuple([_image(cell, self.path, where) for cell in cells if cell not in (None, "")])
        if not text and not images:
            tried = " or ".join(filter(None, (self.text, self.image)))
            sought = f"one of {', '.join(TEXT_NAMES)}, or of {', '.join(IMAGE_NAMES)}"
            raise UserError(f"nothing in {tried}" if tried else f"no column of texts or images; expected {sought}")
        return EmbeddingInput(text or None, images, _text(row, "instruction") or None)


def _text(row: dict[str, Any], column: str | None) -> str | None:
    value = row.get(column) if column else None
    if value is None or isinstance(value, str):
        require_unicode(value, f"column {column}")
        return value
    bytes_found = isinstance(value, list) and any(isinstance(one, ImageRef) for one in value)
    found = "bytes; write the column as text" if bytes_found else shown(value)
    raise UserError(f"column {column}: expected a text, found {found}")


def _choose(names: Iterable[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    there = list(names)
    if wanted is not None and wanted not in there:
        raise UserError(f"no column {shown(wanted)}; there are: {', '.join(there)}")
    by_lower = {name.lower(): name for name in reversed(there)}
    return wanted or next((by_lower[name] for name in usual if name in by_lower), None)


def _image(cell: Any, path: Path, where: str) -> ImageRef:
    if isinstance(cell, ImageRef):
        return cell
    if not isinstance(cell, str):
        raise UserError(f"expected an image path, found {shown(cell)}")
    return image_beside(path, cell, where)


def _named(value: Any) -> Any:
    """A cell as metadata: images, or other bytes of parquet, by the place where they are."""
    if not isinstance(value, list) or not value or not all(isinstance(one, ImageRef) for one in value):
        return value
    names = [str(one) for one in value]
    return names if len(names) > 1 else names[0]


def _json_lines(path: Path, encoding: str) -> Iterator[Row]:
    for number, line in read_lines(path, encoding):
        if isinstance(line, UserError):
            yield number, str(line).removeprefix(f"{path}, line {number}: ")
            continue
        if not line.strip():
            continue
        try:
            row = parse_json(line, "")
        except UserError as error:
            yield number, str(error).removeprefix(": ")
            continue
        yield number, row if isinstance(row, dict) else f"expected an object, found {shown(line.strip())}"


def _csv(path: Path, encoding: str) -> Iterator[Row]:
    rows = delimited_rows(_csv_lines(path, encoding), str(path))
    checked = False
    for number, row in enumerate(rows, start=1):
        if isinstance(row, UserError):
            yield number, str(row)
            continue
        if not checked and (invalid := _first_invalid(row, encoding)):
            raise UserError(f"{path}, first line: {invalid}")
        checked = True
        yield number, _first_invalid(row.values(), encoding) or dict(row)


def _csv_lines(path: Path, encoding: str) -> Iterator[str]:
    """Lines of a CSV file. A row may span lines, so invalid bytes pass as surrogates and are an error of their row."""
    for _, line in read_lines(path, encoding, escape=True):
        if isinstance(line, UserError):
            raise line
        yield line


def _first_invalid(cells: Iterable[str], encoding: str) -> str | None:
    return next(filter(None, (_invalid_byte(cell, encoding) for cell in cells)), None)


def _invalid_byte(cell: str, encoding: str) -> str | None:
    """What is wrong with a cell that holds a byte which is invalid in the encoding; None if nothing is."""
    found = SURROGATE.search(cell)
    if found is None:
        return None
    name = "UTF-8" if encoding == ENCODING else encoding
    return (
        f"byte 0x{ord(found[0]) - 0xDC00:02x} at character {found.start() + 1} of {shown(printable(cell))} is not "
        f"valid {name}; save it as UTF-8, or give the encoding, such as cp1252"
    )


def _parquet(path: Path, encoding: str) -> Iterator[Row]:
    with parquet_errors(path):
        file = open_parquet(path)
        cells = image_columns(file.schema_arrow)
        plain = [name for name in file.schema_arrow.names if name not in cells]
        columns = [*plain, *columns_to_read(file, cells)]
    number, batches = 0, file.iter_batches(columns=columns, batch_size=256)
    while True:
        with parquet_errors(path):  # not around `yield`: an error of the consumer is none of the file
            batch = next(batches, None)
            if batch is None:
                return
            rows = plain_rows(batch, plain)
            members = images_of_rows(batch, cells, number)
        for row, found in zip(rows, members, strict=True):
            # A cell is a reference into the table, which is read when the cell is encoded.
            images = {name: [ImageRef(str(path), member) for member in named] or None for name, named in found.items()}
            yield number, row if isinstance(row, str) else {**row, **images}
            number += 1
