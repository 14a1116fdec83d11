"""What people have, as inputs: folders of images, texts, PDFs and videos, archives of images, tables.

    for record in open_source("photos/"):
        record.key, record.item, record.metadata

A record is cheap: images, pages and frames are references that are read when they are encoded. What cannot even be
listed (a damaged PDF, a row that is no input) is a record with `error` and no `item`: it never stops a job.

    folder                     every image, PDF, video and text file (.txt, .md, as one input each) below it;
                               where there is none of these, its tables
    .jsonl, .csv, .parquet     an input a row, see `vlm2vec.jobs.tables`
    .txt                       an input a line
    .zip, .tar, .tar.gz        every image in it
    an image, PDF or video    that one
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm2vec.data.mmeb.media import IMAGE_ENDINGS
from vlm2vec.errors import UserError
from vlm2vec.jobs.records import Record, SourceSettings, file_version, row_version
from vlm2vec.media import archives, documents
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef
from vlm2vec.types import EmbeddingInput

TEXT_ENDINGS = (".txt", ".md")
TABLE_ENDINGS = (".jsonl", ".csv", ".parquet")
MEDIA_ENDINGS = (*IMAGE_ENDINGS, *TEXT_ENDINGS, *documents.PDF_ENDINGS, *documents.VIDEO_ENDINGS)


class Source:
    """The inputs at a path, in an order that does not change; may be iterated again.

    Attributes:
        passed_over: Files of a folder that are no inputs, by ending; filled by iterating.

    Raises:
        UserError: if nothing is there, or a library that is needed is not installed.
    """

    def __init__(self, path: str | Path, settings: SourceSettings | None = None) -> None:
        self.path, self.settings = Path(path), settings or SourceSettings()
        self.passed_over: Counter[str] = Counter()
        if not self.path.exists():
            raise UserError(f"{path}: no such file or folder")
        if self.settings.every is not None and self.settings.every <= 0:
            raise UserError(f"every {self.settings.every} seconds: expected more than 0")
        name = self.path.name.lower()
        if not self.path.is_dir() and not name.endswith((*MEDIA_ENDINGS, *TABLE_ENDINGS, *archives.ENDINGS)):
            known = " ".join((*MEDIA_ENDINGS, *TABLE_ENDINGS, *archives.ENDINGS))
            raise UserError(f"{path}: not a kind of file that is read; expected a folder or one of {known}")

    def __iter__(self) -> Iterator[Record]:
        name = self.path.name.lower()
        if self.path.is_dir():
            yield from self._folder()
        elif name.endswith(TABLE_ENDINGS):
            yield from self._table(self.path, "")
        elif name.endswith(archives.ENDINGS):
            yield from _archive(self.path)
        elif name.endswith(".txt"):
            yield from _lines(self.path)
        else:
            yield from self._file(self.path, self.path.name)

    def count(self) -> int:
        """Number of records; reads the source once."""
        return sum(1 for _ in self)

    def _folder(self) -> Iterator[Record]:
        found = False
        for path in _walk(self.path):
            key = path.relative_to(self.path).as_posix()
            if path.name.lower().endswith(MEDIA_ENDINGS):
                found = True
                yield from self._file(path, key)
        if found:
            passed = (path for path in _walk(self.path) if not path.name.lower().endswith(MEDIA_ENDINGS))
            self.passed_over = Counter(path.suffix.lower() for path in passed)
            return
        for path in _walk(self.path):
            if path.name.lower().endswith(TABLE_ENDINGS):
                found = True
                yield from self._table(path, f"{path.relative_to(self.path).as_posix()}#")
        if not found:
            kinds = "pictures, PDFs, videos, texts (.txt, .md) nor tables (.jsonl, .csv, .parquet)"
            raise UserError(f"{self.path}: neither {kinds} in this folder")

    def _table(self, path: Path, prefix: str) -> Iterator[Record]:
        from vlm2vec.jobs.tables import read_table

        return read_table(path, prefix, self.settings)

    def _file(self, path: Path, key: str) -> Iterator[Record]:
        name = path.name.lower()
        try:
            if name.endswith(IMAGE_ENDINGS):
                item = EmbeddingInput(images=(ImageRef(path=str(path)),))
                yield Record(key, item, {"path": str(path), "kind": "picture"}, file_version(path))
            elif name.endswith(TEXT_ENDINGS):
                text = path.read_text(encoding="utf-8").strip()
                if not text:
                    raise UserError(f"{path}: the text is empty")
                yield Record(key, EmbeddingInput(text), {"path": str(path), "kind": "text"}, file_version(path))
            elif name.endswith(documents.PDF_ENDINGS):
                yield from _pages(path, key)
            else:
                yield from self._video(path, key)
        except (UserError, OSError, UnicodeDecodeError) as error:
            if isinstance(error.__cause__, ImportError):  # nothing wrong with the file
                raise
            reason = str(error) if isinstance(error, UserError) else f"{path}: {error}"
            yield Record(key, None, {"path": str(path)}, file_version(path), reason)

    def _video(self, path: Path, key: str) -> Iterator[Record]:
        video = documents.Video(str(path))
        about: dict[str, Any] = {"path": str(path)}
        if self.settings.every is None:
            about |= {"kind": "video", "seconds": round(video.seconds, 3)}
            yield Record(key, EmbeddingInput(video=VideoRef(path=str(path))), about, file_version(path))
            return
        for name in video.every(self.settings.every):
            about |= {"kind": "frame", "seconds": float(name.removeprefix("at-").removesuffix("s"))}
            item = EmbeddingInput(images=(ImageRef(str(path), name),))
            yield Record(f"{key}#{name}", item, dict(about), file_version(path))


def open_source(path: str | Path, settings: SourceSettings | None = None) -> Source:
    """The inputs at a path, see this module.

    Raises:
        UserError: if nothing is there, or not of a kind that is read.
    """
    return Source(path, settings)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder by name, without hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def _pages(path: Path, key: str) -> Iterator[Record]:
    pdf = documents.Pdf(str(path))
    for number, name in enumerate(pdf.namelist(), start=1):
        about = {"path": str(path), "kind": "page", "page": number}
        item = EmbeddingInput(images=(ImageRef(str(path), name),))
        yield Record(f"{key}#{name}", item, about, file_version(path))


def _lines(path: Path) -> Iterator[Record]:
    """An input a line; empty lines are none."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if text := line.strip():
                about = {"path": str(path), "kind": "text", "line": number}
                yield Record(f"{path.name}#{number}", EmbeddingInput(text), about, row_version(text, ()))


def _archive(path: Path) -> Iterator[Record]:
    names = sorted(name for name in archives.members(path) if name.lower().endswith(IMAGE_ENDINGS))
    if not names:
        raise UserError(f"{path}: no pictures in this archive")
    for name in names:
        item = EmbeddingInput(images=(ImageRef(str(path), name),))
        yield Record(name, item, {"path": str(path), "kind": "picture", "member": name}, file_version(path))
