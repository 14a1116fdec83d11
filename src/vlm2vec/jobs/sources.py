"""Files, folders, archives and tables as a stream of inputs.

    for record in open_source("photos/"):
        record.key, record.item, record.metadata

A record is cheap: images, pages and frames are references that are read when they are encoded. An input that cannot be
listed (a damaged PDF, an empty row) is a record with `error` and no `item`; it never stops a job.

    folder                     every image, PDF, video and text file (.txt, .md: one input each) below it;
                               if there is none of these, the tables below it
    .jsonl, .csv, .parquet     one input per row, see `vlm2vec.jobs.tables`
    .txt                       one input per line
    .zip, .tar, .tar.gz        every image in the archive
    an image, PDF or video     that file

A folder is listed once. Its files are opened one by one, and only as the records are taken: a job that knows a file's
version asks `Source.files` for the listing and opens the files that changed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from vlm2vec.errors import UserError
from vlm2vec.jobs.records import Record, SourceSettings, file_version, row_version
from vlm2vec.media import archives, documents
from vlm2vec.media.images import IMAGE_ENDINGS, ImageRef
from vlm2vec.media.text import printable, read_lines, read_text
from vlm2vec.media.videos import VideoRef
from vlm2vec.retrieval.metadata import own
from vlm2vec.types import EmbeddingInput

TEXT_ENDINGS = (".txt", ".md")
TABLE_ENDINGS = (".jsonl", ".csv", ".parquet")
MEDIA_ENDINGS = (*IMAGE_ENDINGS, *TEXT_ENDINGS, *documents.PDF_ENDINGS, *documents.VIDEO_ENDINGS)


@dataclass
class Listing:
    """The files below a folder, by name; hidden files and folders are left out.

    Attributes:
        media: Images, texts, PDFs and videos, as paths relative to the folder.
        tables: Tables, as paths relative to the folder.
        other: Number of all other files, by ending.
        links: Linked folders, which are not followed.
        unreadable: Folders that cannot be read, with the reason.
    """

    media: list[str]
    tables: list[str]
    other: Counter[str]
    links: list[str]
    unreadable: list[str]


class Source:
    """The inputs at a path, in an order that does not change; may be iterated again.

    Attributes:
        renamed: Columns of tables that are kept under another name, with that name; filled by iterating.

    Raises:
        UserError: if the path does not exist, its kind is not supported, or a library that it needs is missing.
    """

    def __init__(self, path: str | Path, settings: SourceSettings | None = None) -> None:
        self.path, self.settings = Path(path), settings or SourceSettings()
        self.renamed: dict[str, str] = {}
        self._skipped_members: Counter[str] = Counter()
        if not self.path.exists():
            raise UserError(f"{printable(str(path))}: no such file or folder")
        if self.settings.every is not None and self.settings.every <= 0:
            raise UserError(f"every {self.settings.every} seconds: expected more than 0")
        name = self.path.name.lower()
        if not self.path.is_dir() and not name.endswith((*MEDIA_ENDINGS, *TABLE_ENDINGS, *archives.ENDINGS)):
            known = " ".join((*MEDIA_ENDINGS, *TABLE_ENDINGS, *archives.ENDINGS))
            raise UserError(f"{path}: unsupported kind of file; expected a folder or one of {known}")

    def __iter__(self) -> Iterator[Record]:
        name = self.path.name.lower()
        if self.path.is_dir() and self.listing.media:
            for file in self.files():
                yield from self.records_of(file)
        elif self.path.is_dir():
            tables = (self._table(self.path / file, f"{printable(file)}#") for file in self.listing.tables)
            if self.listing.tables:
                yield from self._rows(chain.from_iterable(tables))
            else:
                kinds = "no images, PDFs, videos, texts (.txt, .md) or tables (.jsonl, .csv, .parquet)"
                raise UserError(f"{self.path}: {kinds} in this folder; {' '.join(self.skipped())}".rstrip("; "))
        elif name.endswith(TABLE_ENDINGS):
            yield from self._rows(self._table(self.path, ""))
        elif name.endswith(archives.ENDINGS):
            yield from self._archive()
        elif name.endswith(".txt"):
            yield from self._rows(_lines(self.path, self.settings.encoding))
        else:
            yield from self.records_of(self.path.name)

    @cached_property
    def listing(self) -> Listing:
        """The files below the folder; read from the disk once."""
        return _list(self.path)

    def files(self) -> list[str]:
        """Images, texts, PDFs and videos of a folder, as relative paths; none for any other source."""
        return self.listing.media if self.path.is_dir() else []

    def key_of(self, file: str) -> str:
        """Key of a file of the folder: a page or frame of it has `KEY#NAME`."""
        return printable(Path(file).as_posix())

    def version_of(self, file: str) -> str:
        """Version of all records of a file; nothing is opened."""
        return self._version(self._place(file))

    def records_of(self, file: str) -> Iterator[Record]:
        """The records of one file of the folder."""
        path = self._place(file)
        about = own(path=printable(str(path)))
        try:
            yield from self._file(path, self.key_of(file), about)
        except (UserError, OSError) as error:
            if isinstance(error.__cause__, ImportError):  # a missing library is no fault of the file
                raise
            reason = str(error) if isinstance(error, UserError) else f"{path}: {error}"
            yield Record(self.key_of(file), None, about, self._version(path), printable(reason))

    def expected(self) -> int | None:
        """Number of inputs, where the listing shows it without opening files: a PDF or video counts as one input."""
        if self.path.is_dir():
            return len(self.listing.media) or None
        name = self.path.name.lower()
        return None if name.endswith((*TABLE_ENDINGS, *archives.ENDINGS, ".txt")) else 1

    def skipped(self) -> list[str]:
        """Sentences on the files that are no inputs: by ending, linked folders, folders that cannot be read."""
        listing = self.listing if self.path.is_dir() else Listing([], [], self._skipped_members, [], [])
        other = Counter(listing.other)
        if listing.media:
            other.update(Path(file).suffix.lower() for file in listing.tables)
        said = []
        if other:
            by_ending = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in other.most_common())
            said.append(f"Skipped {_count(other.total(), 'file')} of other types: {printable(by_ending)}.")
        if listing.links:
            number = _count(len(listing.links), "linked folder")
            said.append(f"Skipped {number}, as links are not followed: {_some(listing.links)}.")
        if listing.unreadable:
            said.append(f"Skipped {_count(len(listing.unreadable), 'unreadable folder')}: {_some(listing.unreadable)}.")
        return said

    def _rows(self, records: Iterator[Record]) -> Iterator[Record]:
        """Records of which there must be one: an index of a file that was cut short would lose all its rows."""
        first = next(records, None)
        if first is None:
            raise UserError(f"{self.path}: no rows; to remove the rows of an earlier index, use vlm2vec forget")
        yield first
        yield from records

    def _place(self, file: str) -> Path:
        return self.path / file if self.path.is_dir() else self.path

    def _version(self, path: Path) -> str:
        every = self.settings.every
        suffix = f"-every-{every}" if every and path.name.lower().endswith(documents.VIDEO_ENDINGS) else ""
        return file_version(path) + suffix

    def _table(self, path: Path, prefix: str) -> Iterator[Record]:
        from vlm2vec.jobs.tables import read_table

        return read_table(path, prefix, self.settings, self.renamed)

    def _archive(self) -> Iterator[Record]:
        members = {name for name in archives.members(self.path) if not _is_hidden(name)}
        names = sorted(name for name in members if name.lower().endswith(IMAGE_ENDINGS))
        self._skipped_members = Counter(Path(name).suffix.lower() for name in members - set(names))
        if not names:
            raise UserError(f"{self.path}: no images in this archive. {' '.join(self.skipped())}".strip())
        version = file_version(self.path)
        for name in names:
            item = EmbeddingInput(images=(ImageRef(str(self.path), name),))
            about = own(path=printable(str(self.path)), kind="image", member=printable(name))
            yield Record(printable(name), item, about, version)

    def _file(self, path: Path, key: str, about: dict[str, object]) -> Iterator[Record]:
        if not path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{path}: not a regular file, or a link to a file that is gone")
        name, version = path.name.lower(), self._version(path)
        if name.endswith(IMAGE_ENDINGS):
            yield Record(key, EmbeddingInput(images=(ImageRef(path=str(path)),)), about | own(kind="image"), version)
        elif name.endswith(TEXT_ENDINGS):
            text = read_text(path, self.settings.encoding).strip()
            if not text:
                raise UserError(f"{path}: the text is empty")
            yield Record(key, EmbeddingInput(text), about | own(kind="text"), version)
        elif name.endswith(documents.PDF_ENDINGS):
            pages = documents.Pdf(str(path)).namelist()
            for number, page in enumerate(pages, start=1):
                item = EmbeddingInput(images=(ImageRef(str(path), page),))
                facts = about | own(kind="page", page=number, pages=len(pages))
                yield Record(f"{key}#{page}", item, facts, version)
        else:
            yield from self._video(path, key, about, version)

    def _video(self, path: Path, key: str, about: dict[str, object], version: str) -> Iterator[Record]:
        video = documents.Video(str(path))
        if self.settings.every is None:
            facts = about | own(kind="video", seconds=round(video.seconds, 3))
            yield Record(key, EmbeddingInput(video=VideoRef(path=str(path))), facts, version)
            return
        frames = video.every(self.settings.every)
        for name in frames:
            seconds = float(name.removeprefix("at-").removesuffix("s"))
            item = EmbeddingInput(images=(ImageRef(str(path), name),))
            yield Record(f"{key}#{name}", item, about | own(kind="frame", seconds=seconds, frames=len(frames)), version)


def open_source(path: str | Path, settings: SourceSettings | None = None) -> Source:
    """The inputs at a path, see this module.

    Raises:
        UserError: if the path does not exist or its kind is not supported.
    """
    return Source(path, settings)


def _is_hidden(member: str) -> bool:
    """Whether a member of an archive is hidden, as files of folders are, or one of those that macOS adds."""
    hidden = (part.startswith(".") or part == "__MACOSX" for part in member.split("/") if part not in (".", ".."))
    return any(hidden)


def _list(folder: Path) -> Listing:
    """Lists a folder by name."""
    found = Listing([], [], Counter(), [], [])

    def failed(error: OSError) -> None:
        found.unreadable.append(printable(f"{error.filename} ({error.strerror})"))

    for place, folders, names in os.walk(folder, onerror=failed):
        below = os.path.relpath(place, folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.links += [printable(f"{place}/{name}") for name in folders if Path(place, name).is_symlink()]
        for name in sorted(name for name in names if not name.startswith(".")):
            file, lower = name if below == "." else f"{below}/{name}", name.lower()
            if lower.endswith(MEDIA_ENDINGS):
                found.media.append(file)
            elif lower.endswith(TABLE_ENDINGS):
                found.tables.append(file)
            else:
                found.other[Path(lower).suffix] += 1
    return found


def _lines(path: Path, encoding: str) -> Iterator[Record]:
    """One record per line that is not empty."""
    for number, line in read_lines(path, encoding):
        key, about = f"{printable(path.name)}#{number}", own(path=printable(str(path)), kind="text", line=number)
        if isinstance(line, UserError):
            yield Record(key, None, about, "", str(line))
        elif text := line.strip():
            yield Record(key, EmbeddingInput(text), about, row_version(text, ()))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
