"""Reads JSON lines strictly and in blocks, so that memory holds only one block of a file of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError, shown
from vlm2vec.media.text import byte_lines, decode, parse_json

BLOCK = 256
Row = dict[str, Any]


class JsonLines:
    """A file with one JSON object per line.

    Args:
        file: The file; blank lines are skipped.
        block: Objects per block.
        keep: Predicate for the objects to keep; None: keep all. If given, every line is parsed once at the start.

    Attributes:
        sizes: Number of objects in each block.

    Raises:
        UserError: if the file is not readable, or, with `keep`, if a line is not a JSON object.
    """

    def __init__(self, file: Path, block: int = BLOCK, keep: Callable[[Row], bool] | None = None) -> None:
        self._file, self._keep = file, keep
        self.sizes: list[int] = []
        self._begins: list[tuple[int, int]] = []  # byte offset and line number of each block
        for place, number, line in _lines(file):
            if keep is not None and not keep(_parsed(line, file, number)):
                continue
            if not self.sizes or self.sizes[-1] == block:
                self._begins.append((place, number))
                self.sizes.append(0)
            self.sizes[-1] += 1

    def read(self, number: int) -> list[tuple[str, Row]]:
        """Returns the objects of a block, each with its location (`file, line 3`).

        Raises:
            UserError: if a line is not UTF-8 or not a JSON object; the message names file and line.
        """
        found: list[tuple[str, Row]] = []
        for _, line_number, line in _lines(self._file, *self._begins[number]):
            row = _parsed(line, self._file, line_number)
            if self._keep is None or self._keep(row):
                found.append((f"{self._file}, line {line_number}", row))
            if len(found) == self.sizes[number]:
                break
        return found


def read_json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    """Yields every object of a file with its location.

    Raises:
        UserError: as `JsonLines.read`.
    """
    for _, number, line in _lines(file):
        yield f"{file}, line {number}", _parsed(line, file, number)


def json_object(text: str, where: str) -> Row:
    """Parses a JSON object.

    Raises:
        UserError: if the text is not a JSON object; the message names the location.
    """
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {shown(value)}")
    return value


def _parsed(line: bytes, file: Path, number: int) -> Row:
    where = f"{file}, line {number}"
    return json_object(decode(line, where), where)


def _lines(file: Path, place: int = 0, number: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """Yields the non-blank lines as (byte offset, line number, bytes), starting at a given offset."""
    try:
        with file.open("rb") as lines:
            lines.seek(place)
            for line in byte_lines(lines):
                if line.strip():
                    yield place, number, line
                place += len(line)
                number += 1
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror or error})") from error
