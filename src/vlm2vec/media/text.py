"""Decodes text files and JSON strictly: an invalid byte is an error, and a byte order mark is not part of the text."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vlm2vec.errors import UserError, shown

if TYPE_CHECKING:
    from markupsafe import Markup

ENCODING = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""
HEAD = 1 << 16
"""Bytes in which the line end of a file is looked for."""
SURROGATE = re.compile("[\ud800-\udfff]")
MARK = "\ufeff"
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@lru_cache(16)
def _newline(encoding: str) -> bytes:
    """The end of a line in an encoding.

    Raises:
        UserError: if Python has no such encoding of text.
    """
    try:
        return "\n".encode(encoding)
    except (LookupError, ValueError) as error:
        raise UserError(
            f"unknown encoding {shown(encoding)}; expected a name such as utf-8, cp1252 or utf-16"
        ) from error


def decode(content: bytes, where: str, encoding: str = ENCODING, *, escape: bool = False) -> str:
    """Decodes bytes to text, without byte order marks at the beginning.

    Args:
        content: Bytes of a file or of a line.
        where: The file, or file and line, for the message.
        encoding: Name of a Python codec.
        escape: Invalid bytes become lone surrogates (PEP 383), for a caller that reports them itself.

    Raises:
        UserError: for an unknown encoding, bytes that are not valid in it, naming the first, or a NUL byte, which is
            valid in UTF-8 but stands in no text: the file is UTF-16 or UTF-32, or no text at all.
    """
    _newline(encoding)
    name = _shown_name(encoding)  # marks are removed below, and UTF-8 is decoded by C code
    try:
        text = content.decode(name, "surrogateescape" if escape else "strict")
    except UnicodeDecodeError as error:
        likely = next((other for mark, other in MARKS.items() if content.startswith(mark)), "cp1252")
        raise UserError(
            f"{where}: not valid {name} at byte {error.start} (0x{content[error.start]:02x}); "
            f"save it as UTF-8, or give the encoding, such as {likely}"
        ) from error
    except UnicodeError as error:  # of codecs that are written in Python
        raise UserError(
            f"{where}: not valid {name} ({' '.join(str(error).split())[:100]}); save it as UTF-8"
        ) from error
    if "\0" in text:
        likely = "utf-16-be" if content.startswith(b"\0") else "utf-16-le"
        raise UserError(
            f"{where}: not valid {name} text: NUL at character {text.index(chr(0)) + 1}; "
            f"save it as UTF-8, or give the encoding, such as {likely}"
        )
    return text.lstrip(MARK)


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


def read_lines(path: Path, encoding: str = ENCODING, *, escape: bool = False) -> Iterator[tuple[int, str | UserError]]:
    """Yields (line number from 1, line with its line end); an invalid line is yielded as its error.

    Args:
        path: The file.
        encoding: Name of a Python codec.
        escape: As in `decode`: a line with invalid bytes is yielded with lone surrogates in their place.

    Raises:
        UserError: if the file is not readable, begins with the byte order mark of another encoding, or is invalid in
            an encoding such as UTF-16 that cannot be split into lines before decoding.
    """
    if _newline(encoding) not in (b"\n", codecs.BOM_UTF8 + b"\n"):  # lines cannot be told apart as bytes
        text = read_text(path, encoding)
        yield from enumerate(io.StringIO(text, newline="\n" if "\n" in text else "\r"), start=1)
        return
    with path.open("rb") as lines:
        head = lines.read(4)
        if other := next((name for mark, name in MARKS.items() if head.startswith(mark)), None):
            raise UserError(
                f"{path}: not valid {_shown_name(encoding)}: it begins with the byte order mark of {other}; "
                f"save it as UTF-8, or give the encoding, such as {other}"
            )
        lines.seek(0)
        for number, line in enumerate(byte_lines(lines), start=1):
            try:
                yield number, decode(line, f"{path}, line {number}", encoding, escape=escape)
            except UserError as error:
                yield number, error


def byte_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file from its position, each with its line end: LF, CR LF, or CR alone as on old Macs.

    CR alone ends a line if there is no LF in the first 64 KiB: a file with LF may have CR inside a quoted cell.
    """
    place = file.tell()
    head = file.read(HEAD)
    file.seek(place)
    if b"\n" in head or b"\r" not in head:
        yield from file
        return
    rest = b""
    while block := file.read(HEAD):
        *whole, rest = (rest + block).split(b"\r")
        yield from (line + b"\r" for line in whole)
    if rest:
        yield rest


def _shown_name(encoding: str) -> str:
    return "UTF-8" if encoding == ENCODING else encoding


def parse_json(text: str, where: str) -> Any:
    """Parses JSON.

    Args:
        text: The JSON text.
        where: The file, or file and line, for the message.

    Raises:
        UserError: for text that is not JSON, a key that an object has twice (one of its values would be lost), a number
            of more than 4,300 digits, or a nesting that is too deep.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"character {error.pos + 1}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg} at {place})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({str(error).partition(';')[0]})") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some pairs, for `object_pairs_hook`.

    Raises:
        ValueError: naming a key that appears twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {shown(next(name for name in names if names.count(name) > 1))} appears twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)  # `json.loads` would make one at each call


def require_unicode(text: str | None, where: str) -> None:
    r"""Checks that a text contains no lone surrogate, which no encoding can represent (JSON's `\ud83d` alone).

    Raises:
        UserError: if it does; the message names the location and the character.
    """
    found = None if text is None or text.isascii() else SURROGATE.search(text)
    if found:
        raise UserError(
            f"{where}: character {found.start() + 1} is a lone surrogate (U+{ord(found[0]):04X}), half of a "
            "surrogate pair; replace it"
        )


def printable(text: str) -> str:
    r"""Escapes what UTF-8 cannot encode: undecodable bytes of a file name as `\xe9`, lone surrogates as `\ud83d`."""
    if text.isascii() or not SURROGATE.search(text):
        return text
    escaped = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return escaped.encode(errors="backslashreplace").decode()


def actual_path(text: str) -> str:
    """Returns the path from the output of `printable`; a path that exists as written is returned unchanged."""
    if "\\x" not in text or os.path.lexists(text):
        return text
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), text)


def breakable(text: str) -> Markup:
    """A name as HTML that may break after `/`, `_`, `-` and `.`, and only there."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[/_.-])", text) if part)
