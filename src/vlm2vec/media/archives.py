"""Reads members of zip, tar and parquet files, pages of PDFs and frames of videos in place, without unpacking.

Zip and plain tar members are read by offset. A gzip-compressed tar is decompressed once to index its members; a copy of
the decompressor state is kept every few megabytes, so that reading a member decompresses only a few megabytes. An
archive in parts (`video_qa.tar.gz-00`, `-01`, …) is read as one file, under the name of its first part.
"""

from __future__ import annotations

import bisect
import glob
import io
import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.media import documents
from vlm2vec.media.cells import ParquetImages
from vlm2vec.media.zips import SharedZip

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
PART = re.compile(r"(.+\.(?:zip|tar|tar\.gz|tgz))-(\d+)", re.IGNORECASE)
CHUNK = 1 << 16
SPACING = 8 << 20


def is_archive(path: str | Path) -> bool:
    """Returns whether this module supports the file name; for an archive in parts, only the first part counts."""
    part = PART.fullmatch(str(path))
    return str(path).lower().endswith(ENDINGS) if part is None else int(part[2]) == 0


def members(path: str | Path) -> frozenset[str]:
    """Returns the names of the files in an archive.

    Raises:
        UserError: if the archive is missing or not readable.
    """
    return _names(str(path), os.getpid(), _stamp(path))


def has_member(path: str | Path, name: str) -> bool:
    """Whether an archive has a file of this name.

    Raises:
        UserError: as `members`.
    """
    opened = _open(str(path), os.getpid(), _stamp(path))
    return name in opened if isinstance(opened, SharedZip) else name in members(path)


def read_member(path: str | Path, name: str) -> bytes:
    """Reads a file from an archive.

    Raises:
        UserError: if the archive is missing, damaged, encrypted, or does not contain the file.
    """
    try:
        return _open(str(path), os.getpid(), _stamp(path)).read(name)
    except KeyError as error:
        what = "the cell is empty or missing" if str(path).endswith(".parquet") else "not in the archive"
        raise UserError(f"{path}:{name}: {what}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}:{name}: the archive is damaged ({error}); download it again") from error
    except RuntimeError as error:  # of zipfile, for members that are encrypted or compressed by an unknown method
        raise UserError(f"{path}:{name}: cannot be read ({error}); unpack the archive and use the folder") from error


class SeekableGzip(io.RawIOBase):
    """A gzip file with random access: decompressor states are kept every `SPACING` bytes."""

    def __init__(self, path: str, mode: str = "rb") -> None:
        self._file: Any = _open_file(path, mode)
        # (output offset, input offset, decompressor); a copy of the decompressor contains its complete state.
        self._points: list[tuple[int, int, Any]] = [(0, 0, zlib.decompressobj(31))]
        self._position = 0
        self._restart(0)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Returns the position in the decompressed content."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position in the decompressed content without reading."""
        if whence == io.SEEK_END:
            raise OSError("the length of the decompressed content is unknown")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes of the decompressed content."""
        stop = self._position + size if size >= 0 else 1 << 62
        begin = self._decoded - len(self._buffer)
        nearest = bisect.bisect_right([out for out, _, _ in self._points], self._position) - 1
        if self._position < begin or self._points[nearest][0] > self._decoded:
            self._restart(nearest)
        parts = []
        while True:
            begin = self._decoded - len(self._buffer)
            part = self._buffer[max(self._position - begin, 0) : max(stop - begin, 0)]
            parts.append(part)
            self._position += len(part)
            if self._position >= stop or not self._more():
                return b"".join(parts)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()

    def _restart(self, number: int) -> None:
        self._decoded, begin, decoder = self._points[number]
        self._decoder = decoder.copy()
        self._buffer = b""
        self._file.seek(begin)

    def _more(self) -> bool:
        """Decompresses one chunk into the buffer; False at the end."""
        taken = self._file.read(CHUNK)
        if not taken:
            if not self._decoder.eof:
                raise EOFError("unexpected end of file")
            return False
        self._buffer = self._decoder.decompress(taken)
        while self._decoder.eof and self._decoder.unused_data:  # a gzip file may have several members
            rest = self._decoder.unused_data
            self._decoder = zlib.decompressobj(31)
            self._buffer += self._decoder.decompress(rest)
        self._decoded += len(self._buffer)
        if self._decoded - self._points[-1][0] >= SPACING:
            self._points.append((self._decoded, self._file.tell(), self._decoder.copy()))
        return True


class JoinedParts(io.RawIOBase):
    """Reads consecutive files as a single file.

    Args:
        paths: The parts in order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._ends = list(accumulate(path.stat().st_size for path in paths))
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Returns the position in the joined content."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position in the joined content."""
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        self._position = max(0, begin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads from the part at the current position into the buffer; returns 0 at the end."""
        number = bisect.bisect_right(self._ends, self._position)
        if number == len(self._files):
            return 0
        file = self._files[number]
        file.seek(self._position - (self._ends[number - 1] if number else 0))
        content = file.read(len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        """Closes the parts."""
        for file in self._files:
            file.close()
        super().close()


class _Tar:
    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        opened = SeekableGzip if _whole_name(path).endswith("gz") else _open_file
        self._file: Any = opened(path, "rb")
        self._places: dict[str, tuple[int, int]] = {}
        with tarfile.open(fileobj=self._file, mode="r:") as archive:
            self._places = {
                member.name.removeprefix("./"): (member.offset_data, member.size)
                for member in archive
                if member.isfile()
            }

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def namelist(self) -> list[str]:
        """Returns the names of the files."""
        return list(self._places)

    def read(self, name: str) -> bytes:
        """Reads a file."""
        offset, size = self._places[name]
        with self._lock:
            self._file.seek(offset)
            content: bytes = self._file.read(size)
        if len(content) != size:
            raise EOFError(f"{name} is truncated")
        return content


def _open_file(path: str, mode: str = "rb") -> Any:
    """Opens a file, or the parts of a file as a single file.

    Raises:
        UserError: if a part between two existing parts is missing; the message names the first one.
    """
    first = PART.fullmatch(path)
    if first is None:
        return Path(path).open(mode)
    here = Path(path).parent
    numbers = sorted(
        (int(part[2]), file)
        for file in here.glob(f"{glob.escape(Path(first[1]).name)}-*")
        if (part := PART.fullmatch(str(file)))
    )
    for wanted, (number, _) in enumerate(numbers):
        if number != wanted:
            missing = f"{first[1]}-{wanted:0{len(first[2])}}"
            raise UserError(f"{missing}: this part of the archive is missing; download it again")
    return io.BufferedReader(JoinedParts([file for _, file in numbers]), CHUNK)


def _whole_name(path: str) -> str:
    """The name of an archive without the number of its part, in lower case, which tells its kind."""
    part = PART.fullmatch(path)
    return (path if part is None else part[1]).lower()


def _stamp(path: str | Path) -> tuple[int, int]:
    """Returns a value that changes when the file is replaced, which invalidates cached handles."""
    try:
        about = Path(path).stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


@lru_cache(maxsize=64)
def _open(
    path: str, process_id: int, stamp: tuple[int, int]
) -> SharedZip | zipfile.ZipFile | _Tar | ParquetImages | documents.Pdf | documents.Video:
    """Opens an archive once per process; threads share the handle, forks do not (they would share its position)."""
    if documents.is_document(path):
        return documents.open_document(path)
    name = _whole_name(path)
    kind = Path(name).suffix.removeprefix(".") if name.endswith((".zip", ".parquet")) else "tar"
    try:
        if kind == "parquet":
            return ParquetImages(path)
        if kind == "zip":
            shared = None if PART.fullmatch(path) else _shared_zip(path, stamp)
            return shared or zipfile.ZipFile(_open_file(path) if PART.fullmatch(path) else path)
        return _Tar(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: {kind} not found") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a readable {kind} ({error}); download it again") from error


@lru_cache(maxsize=64)
def _shared_zip(path: str, stamp: tuple[int, int]) -> SharedZip | None:
    """Opens a zip once for this process and the processes forked from it."""
    return SharedZip.of(path)


@lru_cache(maxsize=64)
def _names(path: str, process_id: int, stamp: tuple[int, int]) -> frozenset[str]:
    opened: Any = _open(path, process_id, stamp)
    return frozenset(opened.namelist())
