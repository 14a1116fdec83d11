"""Decodes text files strictly: an invalid byte is an error, and a byte order mark is not part of the text."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vlm2vec.errors import UserError, shown

ENCODING = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""
SURROGATE = re.compile("[\ud800-\udfff]")
MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(content: bytes, where: str, encoding: str = ENCODING) -> str:
    """Decodes bytes to text.

    Args:
        content: Bytes of a file or of a line.
        where: The file, or file and line, for the message.
        encoding: Name of a Python codec.

    Raises:
        UserError: for an unknown encoding or an invalid byte; the message gives its position.
    """
    try:
        return content.decode(encoding)
    except LookupError as error:
        raise UserError(
            f"unknown encoding {shown(encoding)}; expected a name such as utf-8, cp1252 or utf-16"
        ) from error
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == ENCODING else encoding
        likely = next((other for mark, other in MARKS.items() if content.startswith(mark)), "cp1252")
        raise UserError(
            f"{where}: not valid {name} at byte {error.start} (0x{content[error.start]:02x}); "
            f"save it as UTF-8, or give the encoding, such as {likely}"
        ) from error


def read_text(path: Path, encoding: str = ENCODING) -> str:
    """Reads a text file.

    Raises:
        UserError: if the file is missing, not readable, or not valid in the encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    return decode(content, str(path), encoding)


def read_lines(path: Path, encoding: str = ENCODING) -> Iterator[tuple[int, str | UserError]]:
    """Yields (line number from 1, line with its line end); an invalid line is yielded as its error.

    Raises:
        UserError: if the file is not readable, or is invalid in an encoding such as UTF-16 that cannot be split into
            lines before decoding.
    """
    if encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
        yield from enumerate(read_text(path, encoding).splitlines(keepends=True), start=1)
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, decode(line, f"{path}, line {number}", encoding)
            except UserError as error:
                yield number, error


def require_unicode(text: str | None, where: str) -> None:
    r"""Checks that a text contains no lone surrogate, which no encoding can represent (JSON's `\ud83d` alone).

    Raises:
        UserError: if it does; the message names the location and the character.
    """
    found = SURROGATE.search(text or "")
    if found:
        raise UserError(
            f"{where}: character {found.start() + 1} is a lone surrogate (U+{ord(found[0]):04X}), half of a "
            "surrogate pair; replace it"
        )


def printable(text: str) -> str:
    r"""Escapes what UTF-8 cannot encode: undecodable bytes of a file name as `\xe9`, lone surrogates as `\ud83d`."""
    if not SURROGATE.search(text):
        return text
    escaped = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return escaped.encode(errors="backslashreplace").decode()


def actual_path(text: str) -> str:
    """Returns the path from the output of `printable`; a path that exists as written is returned unchanged."""
    if "\\x" not in text or os.path.lexists(text):
        return text
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), text)
