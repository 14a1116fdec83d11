"""Reads the rows of a table: JSON lines, JSON, CSV, TSV, parquet, or a folder of images with captions."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError, shown
from vlm2vec.media.cells import columns_to_read, image_columns, images_of_rows, open_parquet, parquet_errors, plain_rows
from vlm2vec.media.delimited import delimited_rows
from vlm2vec.media.images import IMAGE_ENDINGS, ImageRef
from vlm2vec.media.text import byte_lines, decode, parse_json, read_text

logger = logging.getLogger(__name__)
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
METADATA = "metadata"
EXAMPLE = '{"text": "a red car", "image": "images/1.jpg"}'

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]


def is_table(source: Path) -> bool:
    """Returns whether a path is a folder or has the file ending of a table."""
    return source.is_dir() or source.suffix.lower() in TABLES


def read_rows(source: Path) -> Rows:
    """Yields every row with its location, such as `line 7`. Parquet image cells become `ImageRef`s, not yet decoded.

    Raises:
        UserError: if the file is missing or not readable; the message names file and row.
    """
    if source.is_dir():
        return _folder_rows(source)
    suffix = source.suffix.lower()
    if not source.is_file():
        raise UserError(f"{source}: no such file; expected a {', '.join(TABLES)} file or a folder of images")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if suffix not in TABLES:
        raise UserError(f"{source}: unsupported format; expected {', '.join(TABLES)} or a folder of images")
    return readers.get(suffix, _csv_rows)(source)


def _jsonl_rows(source: Path) -> Rows:
    with source.open("rb") as lines:
        for number, line in enumerate(byte_lines(lines), start=1):
            place = f"line {number}"
            if line.strip():
                yield (
                    place,
                    _object(parse_json(decode(line, f"{source}, {place}"), f"{source}, {place}"), source, place),
                )


def _json_rows(source: Path) -> Rows:
    content = parse_json(read_text(source), str(source))
    if not isinstance(content, list):
        raise UserError(f"{source}: expected a list of objects; if each line is an object, rename the file to .jsonl")
    for number, value in enumerate(content):
        yield f"row {number}", _object(value, source, f"row {number}")


def _object(value: Any, source: Path, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{source}, {place}: expected an object such as {EXAMPLE}, found {shown(value)}")
    return value


def _csv_rows(source: Path) -> Rows:
    delimiter = "\t" if source.suffix.lower() == ".tsv" else None
    rows = delimited_rows(io.StringIO(read_text(source), newline=""), str(source), delimiter)
    for number, row in enumerate(rows):
        if isinstance(row, UserError):
            raise UserError(f"{source}, row {number}: {row}")
        yield f"row {number}", dict(row)


def _parquet_rows(source: Path) -> Rows:
    with parquet_errors(source):
        table = open_parquet(source)
        names = table.schema_arrow.names
        held = image_columns(table.schema_arrow)
        plain = [name for name in names if name not in held]
        batches = table.iter_batches(columns=[*plain, *columns_to_read(table, held)])
    number, path = 0, str(source.absolute())
    while True:
        with parquet_errors(source):
            batch = next(batches, None)
            if batch is None:
                return
            found = images_of_rows(batch, held, number)
            rows = plain_rows(batch, plain)
        for values, members in zip(rows, found, strict=True):
            place = f"row {number}"
            origin = f"{source}, {place}"
            if isinstance(values, str):
                raise UserError(f"{origin}: {values}")
            cells = {name: [ImageRef(path, one, origin=origin) for one in members[name]] for name in held}
            yield place, {name: cells.get(name, values.get(name)) for name in names}
            number += 1


def _folder_rows(source: Path) -> Rows:
    tables = [path for ending in TABLES if (path := source / f"{METADATA}{ending}").is_file()]
    if tables:
        yield from read_rows(tables[0])
        return
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not images:
        raise UserError(f"{source}: contains no images; expected images with captions, or a file such as pairs.jsonl")
    captioned = [path for path in images if path.with_suffix(".txt").is_file()]
    if not captioned:
        how = "put IMAGE.txt next to each image, or add a metadata.csv with the columns file_name and text"
        raise UserError(f"{source}: {len(images)} images without captions; {how}")
    if len(captioned) < len(images):
        left_out = sorted(set(images) - set(captioned))
        first = left_out[0].relative_to(source)
        logger.warning("%s: skipped %d images without a caption; the first is %s", source, len(left_out), first)
    for path in captioned:
        name = str(path.relative_to(source))
        yield name, {"text": read_text(path.with_suffix(".txt")).strip(), "image": name}
