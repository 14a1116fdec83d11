"""One input of a source with its key, metadata and version, and the settings by which sources are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm2vec.media.images import ImageRef
from vlm2vec.media.text import ENCODING
from vlm2vec.types import EmbeddingInput


@dataclass(frozen=True, slots=True)
class Record:
    """One input and its metadata.

    Attributes:
        key: Name of the input within its source, equal at every reading: path below the folder, and page, time, line or
            row. Always valid Unicode.
        item: The input; None if there is none, see `error`.
        metadata: Fields of this package (see `vlm2vec.retrieval.metadata.own`): `path`, `kind` (image, text, page,
            video, frame, row), and by kind `page`, `pages`, `seconds`, `line`, `row`, `member`; and a table's other
            columns, under the names of `vlm2vec.retrieval.metadata.column_name`.
        version: Changes when the input does: size and time of its files, content of its row.
        error: Why there is no input.
    """

    key: str
    item: EmbeddingInput | None
    metadata: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """How inputs are made from files.

    Attributes:
        every: Makes one input of every frame at 0, `every`, 2 `every`, … seconds of a video; None: a video is one
            input, from which the model samples frames by its own setting (`num_frames`).
        text_column, image_column, key_column: Columns of a table; None: found by name, see `vlm2vec.jobs.tables`.
        encoding: Encoding of text files and tables, any that Python knows; the default is UTF-8 with or without a byte
            order mark. Bytes that are not valid in it are an error of their file or row.
    """

    every: float | None = None
    text_column: str | None = None
    image_column: str | None = None
    key_column: str | None = None
    encoding: str = ENCODING


def row_version(text: str, images: tuple[ImageRef, ...]) -> str:
    """Version of a table's row: a hash of its content, and of size and time of the files that it names."""
    files = [file_version(Path(image.path)) for image in images if image.path and image.member is None]
    return hashlib.sha256("\n".join([text, *files]).encode(errors="surrogatepass")).hexdigest()[:16]


def file_version(path: Path) -> str:
    """Size and time of a file; "" if it is missing, or if no file can have this name."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{about.st_size}-{about.st_mtime_ns}"
