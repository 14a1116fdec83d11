"""Classifies the columns of parquet files as texts or images, and reads the images in their cells.

All readers use `cell_kind` to interpret an Arrow type. An image cell contains bytes of any binary type, the struct of
the hub's Image type (`bytes`, `path`; a path without bytes is relative to the table), or a list of these.
"""

from __future__ import annotations

import bisect
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2vec.errors import UserError, shown

Kind = Literal["text", "image", "images", "other"]
CELL = re.compile(r"(.+)\[(\d+)\]")
types = pa.types
NO_VALUE = (ValueError, OverflowError, KeyError)
"""Exceptions of Arrow values that Python cannot represent."""


@contextmanager
def parquet_errors(path: str | Path) -> Iterator[None]:
    """Turns what pyarrow raises of a damaged file or an unsupported column into one line with the file.

    Raises:
        UserError: naming the file and the first line of pyarrow's message, or the name or path that is not valid UTF-8.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a readable parquet file ({reason}); write it or download it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {shown(error.object)} is not valid UTF-8; write the column again") from error


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Opens a parquet file; no rows are read.

    Raises:
        UserError: if it is damaged, or two of its columns have one name, so that a row could hold only one of them.
    """
    with parquet_errors(path):
        file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: two columns are named {shown(twice)}; rename one of them")
    return file


def cell_kind(kind: pa.DataType) -> Kind:
    """Returns the kind of a column with this Arrow type; "images" means a list of images in each cell."""
    if types.is_dictionary(kind):
        return cell_kind(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "image"
    if types.is_fixed_size_binary(kind):
        return "image"
    if types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return "image" if "bytes" in names or names == {"path"} else "other"
    if is_list(kind):
        return "images" if cell_kind(kind.value_type) == "image" else "other"
    return "other"


def is_list(kind: pa.DataType) -> bool:
    """Returns whether an Arrow type is a list of any layout."""
    plain = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(plain or types.is_list_view(kind) or types.is_large_list_view(kind))


def image_columns(schema: pa.Schema) -> list[str]:
    """Returns the names of the columns whose cells contain images or lists of images."""
    return [field.name for field in schema if cell_kind(field.type) in ("image", "images")]


def columns_to_read(file: pq.ParquetFile, names: Sequence[str]) -> list[str]:
    """Returns the image columns that `image_members` must read: lists, and columns that may have empty cells.

    The statistics of the file tell which columns have no empty cells; listing rows does not read their images.
    """
    full = {name for name in names if cell_kind(file.schema_arrow.field(name).type) == "image"}
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        for place in range(about.num_columns):
            column = about.column(place)
            counted = column.statistics is not None and column.statistics.null_count == 0
            for name in [] if counted else list(full):
                field = column.path_in_schema.removeprefix(name)
                is_path = field == ".path" and _has_bytes(file.schema_arrow.field(name).type)
                if field in ("", ".bytes", ".path") and not is_path:
                    full.discard(name)
    return [name for name in names if name not in full]


def _has_bytes(kind: pa.DataType) -> bool:
    return bool(types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def plain_rows(rows: Any, names: Sequence[str]) -> list[dict[str, Any] | str]:
    """Rows of an Arrow table or batch as Python values; a row that has none is the reason instead.

    Arrow does not check texts when it reads them, so they may be invalid UTF-8. Times that Python cannot represent
    (after the year 9999, or in an unknown time zone) become text.
    """
    if not names:
        return [{} for _ in range(rows.num_rows)]
    chosen = rows.select(names)
    try:
        found: list[dict[str, Any] | str] = chosen.to_pylist()
        return found
    except NO_VALUE:
        return [_plain_row(chosen.slice(i, 1)) for i in range(chosen.num_rows)]


def _plain_row(row: Any) -> dict[str, Any] | str:
    values: dict[str, Any] = {}
    for name in row.schema.names:
        cell = row.column(name)[0]
        try:
            values[name] = cell.as_py()
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} (0x{error.object[error.start]:02x})"
            return f"column {name}: not valid UTF-8 at {byte}; write the column again"
        except NO_VALUE as error:
            try:
                whole = pa.int32() if cell.type.bit_width == 32 else pa.int64()
                values[name] = f"{cell.cast(whole).as_py()} {cell.type}"
            except (pa.ArrowException, *NO_VALUE):
                return f"column {name}: a value of type {cell.type} cannot be read ({error}); write the column as text"
    return values


def images_of_rows(rows: Any, names: Sequence[str], first: int) -> list[dict[str, list[str]]]:
    """Returns `image_members` for each row and image column.

    Args:
        rows: An Arrow table or batch with the columns of `columns_to_read`.
        names: The image columns of the file; columns missing from `rows` have no empty cells.
        first: Index of the first row in the file.
    """
    seen = {name: image_members(rows.column(name), name, first) for name in names if name in rows.schema.names}
    return [
        {name: seen[name][i] if name in seen else [f"{name}[{first + i}]"] for name in names}
        for i in range(rows.num_rows)
    ]


def image_members(column: Any, name: str, first: int) -> list[list[str]]:
    """Returns the images in each cell of a column, as names for `ParquetImages.read`; an empty cell has no images.

    Args:
        column: An Arrow array or chunked array.
        name: Name of the column.
        first: Index of its first row in the file.
    """
    if cell_kind(column.type) == "images":
        cells = enumerate(column, start=first)
        return [
            [f"{name}[{row}][{i}]" for i, item in enumerate(cell.as_py() or ()) if _is_filled(item)]
            for row, cell in cells
        ]
    return [[] if empty else [f"{name}[{row}]"] for row, empty in enumerate(_empty(column), start=first)]


def _empty(column: Any) -> list[bool]:
    """Returns which cells of an image column have neither bytes nor a path; only their lengths are read."""
    kind = column.type
    if types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)} & {"bytes", "path"}
        fields = [_empty(pc.struct_field(column, name)) for name in sorted(names)]
        return [all(parts) for parts in zip(*fields, strict=True)]
    if types.is_null(kind):
        return [True] * len(column)
    if types.is_dictionary(kind) or types.is_binary_view(kind) or types.is_string_view(kind):  # lengths are unsupported
        return [not _is_filled(cell.as_py()) for cell in column]
    return [not length for length in pc.binary_length(column).to_pylist()]


def _is_filled(value: Any) -> bool:
    return bool((value.get("bytes") or value.get("path")) if isinstance(value, dict) else value)


class ParquetImages:
    """The images of a parquet file by name: `column[row]`, or `column[row][position]` in a list.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._file = open_parquet(path)
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._begins = [0, *accumulate(counts)][:-1]
        self._recent: tuple[int, str, Any] = (-1, "", None)
        self._lock = threading.Lock()

    def namelist(self) -> list[str]:
        """Returns the names of all image cells, or of the images in each cell of a list column."""
        schema, rows = self._file.schema_arrow, self._file.metadata.num_rows
        found: list[str] = []
        for name in image_columns(schema):
            if cell_kind(schema.field(name).type) == "image":
                found += [f"{name}[{row}]" for row in range(rows)]
            else:
                with parquet_errors(self._path):
                    column = self._file.read(columns=[name]).column(name)
                found += [member for members in image_members(column, name, 0) for member in members]
        return found

    def read(self, name: str) -> bytes:
        """Reads the encoded image of a cell; only its row group is read.

        Raises:
            KeyError: if the cell does not exist or is empty.
            UserError: if the cell has only a path and that file does not exist.
        """
        column, *places = self._split(name)
        group = bisect.bisect_right(self._begins, places[0]) - 1
        with self._lock:
            if self._recent[:2] != (group, column):
                with parquet_errors(self._path):
                    rows = self._file.read_row_group(group, columns=[column])
                self._recent = (group, column, rows.column(column))
            with parquet_errors(self._path):
                value = self._recent[2][places[0] - self._begins[group]].as_py()
        for place in places[1:]:
            value = value[place] if value and place < len(value) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return bytes(content)
        if isinstance(value, dict) and value.get("path"):
            return self._beside(value["path"], name)
        raise KeyError(name)

    def _split(self, name: str) -> list[Any]:
        """Splits a name into column, row and, for lists, position; the column name itself may end in a bracket."""
        rest = name
        places: list[int] = []
        while found := CELL.fullmatch(rest):
            rest, places = found[1], [int(found[2]), *places]
            if rest in self._file.schema_arrow.names and places[0] < self._file.metadata.num_rows:
                return [rest, *places]
        raise KeyError(name)

    def _beside(self, path: str, name: str) -> bytes:
        try:
            return (self._path.parent / path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self._path}, {name}: has no bytes, and its path {shown(path)} is not a file next to the table"
            ) from error
