"""Text files, decoded strictly: a byte that is not valid is an error, and a byte order mark is not part of the text."""

from __future__ import annotations

import codecs
from pathlib import Path

from vlm2vec.errors import UserError

ENCODING = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""
MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(content: bytes, where: str, encoding: str = ENCODING) -> str:
    """Bytes as text.

    Args:
        content: A whole file, or a line of one.
        where: The file, or file and line, for the message.
        encoding: Any of Python's.

    Raises:
        UserError: for an unknown encoding, or bytes that are not valid in it, naming the first.
    """
    try:
        return content.decode(encoding)
    except LookupError as error:
        raise UserError(f"encoding {encoding!r} is unknown; expected a name such as utf-8, cp1252 or utf-16") from error
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == ENCODING else encoding
        likely = next((other for mark, other in MARKS.items() if content.startswith(mark)), "cp1252")
        raise UserError(
            f"{where}: not valid {name} at byte {error.start} (0x{content[error.start]:02x}); "
            f"save it as UTF-8, or give the encoding, such as {likely}"
        ) from error


def read_text(path: Path, encoding: str = ENCODING) -> str:
    """A whole text file.

    Raises:
        UserError: if it is missing, not readable, or not valid in the encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    return decode(content, str(path), encoding)
