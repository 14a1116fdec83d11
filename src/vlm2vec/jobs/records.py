"""One input of a source with its key, metadata and version, and the settings by which sources are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput


@dataclass(frozen=True, slots=True)
class Record:
    """One input and what is known of it.

    Attributes:
        key: Names it within its source, the same at every reading: path below the folder, and page, time, line or row.
        item: The input; None where there is none to be had.
        metadata: `path`, `kind` (image, text, page, video, frame, row) and what the kind has: `page`, `seconds`,
            `line`, a table's other columns.
        version: Changes when the input does (size and time of its files, content of its row).
        error: Why there is no input.
    """

    key: str
    item: EmbeddingInput | None
    metadata: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """How inputs are made.

    Attributes:
        every: A video is an input every so many seconds, each of one frame; None: it is one input, of which the model
            takes frames by its own setting (`num_frames`).
        text_column, image_column, key_column: A table's columns; None: found by name, see `vlm2vec.jobs.tables`.
    """

    every: float | None = None
    text_column: str | None = None
    image_column: str | None = None
    key_column: str | None = None


def row_version(text: str, images: tuple[ImageRef, ...], folder_of: Path | None = None) -> str:
    """Version of a table's row: its content, and size and time of the files that it names."""
    files = [file_version(Path(image.path)) for image in images if image.path and image.member is None]
    return hashlib.sha256("\n".join([text, *files]).encode(errors="replace")).hexdigest()[:16]


def file_version(path: Path) -> str:
    """Size and time of a file; "" where it is missing."""
    try:
        about = path.stat()
    except OSError:
        return ""
    return f"{about.st_size}-{about.st_mtime_ns}"
