"""Rows of delimited text (CSV): the delimiter is found in the header, and no column or cell is lost."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, dropwhile, islice

from vlm2vec.errors import UserError, shown

DELIMITERS = ",;\t|"
"""The first is the delimiter of a header without any of them. Spreadsheets of many languages write semicolons."""
QUOTED = re.compile(r'"[^"]*"')
STATED = re.compile(r'"?sep=(.)"?\s*')  # first line that some spreadsheets write


def delimited_rows(
    lines: Iterator[str], where: str, delimiter: str | None = None
) -> Iterator[dict[str, str] | UserError]:
    """Yields the rows below the header; a row with more or fewer cells than the header is an error instead.

    Args:
        lines: Lines with their line ends. A quoted cell may span lines.
        where: The file, for the message.
        delimiter: None: the most frequent of `DELIMITERS` in the header, or the one that a first line `sep=;` states.

    Raises:
        UserError: for text that cannot be split into cells, such as an unclosed quotation mark.
    """
    lines = dropwhile(lambda line: not line.strip(), lines)  # blank lines above the header
    head = list(islice(lines, 1))
    if head and (stated := STATED.fullmatch(head[0])):
        delimiter, head = stated[1], list(islice(lines, 1))
    if delimiter is None:
        delimiter = max(DELIMITERS, key=QUOTED.sub("", head[0]).count) if head else DELIMITERS[0]
    csv.field_size_limit(sys.maxsize)
    try:
        rows = csv.reader(chain(head, lines), delimiter=delimiter, strict=True)
        names = unique_names(next(rows, []))
        for cells in rows:
            if len(cells) == len(names):
                yield dict(zip(names, cells, strict=True))
            elif cells:  # not a blank line
                counts = f"expected {len(names)} cells as in the header, found {len(cells)}"
                yield UserError(f"{counts}; quote cells that contain {shown(delimiter)}")
    except csv.Error as error:
        raise UserError(f"{where}: not a readable CSV file ({error})") from error


def unique_names(names: Sequence[str]) -> list[str]:
    """Names of columns without blanks around them; a name that appeared before gets a number, as `price (2)`."""
    found: list[str] = []
    for name in map(str.strip, names):
        numbered, number = name, 1
        while numbered in found or (number > 1 and numbered in names):
            number += 1
            numbered = f"{name} ({number})"
        found.append(numbered)
    return found
