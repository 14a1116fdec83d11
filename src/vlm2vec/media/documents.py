"""Reads PDF pages and video frames as images: a PDF is treated as an archive of pages, a video as one of frames.

Pages are named `page-3` (counted from 1), frames `at-12.400s`. PDFs require the extra `pdf`, videos the extra `video`.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError

PDF_ENDINGS = (".pdf",)
VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg")
PAGE_SCALE = 2.0  # 144 dpi: small print stays readable
ALONE = {"protocol_whitelist": "none"}  # prevents a playlist from making the decoder open other files or URLs
_pdfium = threading.Lock()  # the library is not thread-safe, even for separate documents


def is_document(path: str | Path) -> bool:
    """Returns whether this module supports the file name."""
    return str(path).lower().endswith((*PDF_ENDINGS, *VIDEO_ENDINGS))


def open_document(path: str) -> Pdf | Video:
    """Opens a PDF or video.

    Raises:
        UserError: if the file is missing or not readable, or the required library is not installed.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return Pdf(path) if path.lower().endswith(PDF_ENDINGS) else Video(path)


def digest(path: str, name: str) -> str:
    """Returns a hash that identifies a page or frame by file content and position, without rendering it.

    Raises:
        UserError: if the file is missing.
    """
    try:
        about = Path(path).stat()
    except OSError as error:
        raise UserError(f"{path}: no such file") from error
    return hashlib.sha256(f"{_file_digest(path, about.st_mtime_ns, about.st_size)} {name}".encode()).hexdigest()


def need_pdf() -> Any:
    """Imports the library that renders PDF pages.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError("reading PDFs requires pypdfium2: pip install 'vlm2vec[pdf]'") from error
    return pypdfium2


def need_video() -> Any:
    """Imports the library that decodes videos.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("reading videos requires PyAV: pip install 'vlm2vec[video]'") from error
    return av


class Pdf:
    """A PDF as an archive of pages. It is reopened for each page, which is cheap compared to rendering."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._pdfium = need_pdf()
        with _pdfium, self._open() as document:
            self.num_pages = len(document)

    def namelist(self) -> list[str]:
        """Returns the names of the pages, in order."""
        return [f"page-{number}" for number in range(1, self.num_pages + 1)]

    def read(self, name: str) -> bytes:
        """Renders a page at 144 dpi; returns the bytes of an image file."""
        number = int(name.removeprefix("page-"))
        if not 1 <= number <= self.num_pages:
            raise KeyError(name)
        with _pdfium, self._open() as document:
            try:
                document.init_forms()
                return _as_file(document[number - 1].render(scale=PAGE_SCALE, may_draw_forms=True).to_pil())
            except self._pdfium.PdfiumError as error:
                raise UserError(f"{self._path}, page {number}: rendering failed ({error})") from error

    def _open(self) -> Any:
        try:
            return self._pdfium.PdfDocument(self._path)
        except self._pdfium.PdfiumError as error:
            raise UserError(f"{self._path}: not a readable PDF ({error})") from error


class Video:
    """A video as an archive of frames. It is reopened for each frame, so threads can share this object."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._av = need_video()
        with self._open() as container:
            stream = container.streams.video[0]
            if stream.duration is not None:
                self.seconds = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                self.seconds = container.duration / 1e6
            else:
                self.seconds = max((frame.time for frame in container.decode(stream)), default=0.0)

    def every(self, seconds: float) -> list[str]:
        """Returns the names of the frames at 0, `seconds`, 2 `seconds`, …"""
        return [f"at-{i * seconds:.3f}s" for i in range(max(1, int(self.seconds / seconds + 0.999)))]

    def read(self, name: str) -> bytes:
        """Decodes the frame shown at a time, or the last frame if the video is shorter; returns image file bytes."""
        wanted = float(name.removeprefix("at-").removesuffix("s"))
        found = None
        with self._open() as container:
            stream = container.streams.video[0]
            container.seek(max(0, int(wanted / stream.time_base)), stream=stream)  # to the preceding key frame
            for frame in container.decode(stream):
                if found is not None and frame.time > wanted:
                    break
                found = frame
            if found is None:
                raise UserError(f"{self._path}: no frame at {wanted:.1f} s")
            return _as_file(found.to_image())

    @contextmanager
    def _open(self) -> Iterator[Any]:
        file = Path(self._path).open("rb")  # noqa: SIM115  (closed below)
        with file:
            try:
                with self._av.open(file, options=ALONE) as container:
                    if not container.streams.video:
                        raise UserError(f"{self._path}: contains no video stream")
                    yield container
            except self._av.FFmpegError as error:
                raise UserError(f"{self._path}: not a readable video ({str(error).splitlines()[0]})") from error


@lru_cache(maxsize=256)
def _file_digest(path: str, changed: int, size: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_file(image: Any) -> bytes:
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, format="PPM")  # lossless and the fastest format to write and read
    return encoded.getvalue()
