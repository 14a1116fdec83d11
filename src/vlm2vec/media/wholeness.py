"""Whether image files are whole: by header and end mark, which costs no decoding, and remembered between runs."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.files import replacing
from vlm2vec.media.images import ImageRef, open_file

TAIL = 64
JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
"""Modes that always convert to RGB, whatever the values."""
MAX_FILES = 32  # of remembered images; more are merged into one


def check_ends(image: ImageRef) -> None:
    """Checks an image by its header and end mark (JPEG, PNG, WebP); decodes it if these do not show that it is whole.

    Damage in the middle of a file with a valid end is not found.

    Raises:
        UserError: if the image is missing or not readable.
    """
    if not _has_ends(image):
        image.load()


def _has_ends(image: ImageRef) -> bool:
    if image.is_rendered():
        return False
    try:
        if image.path is not None and image.member is None:
            with Path(image.path).open("rb") as file:
                return _is_whole(file, image.path)
        return _is_whole(io.BytesIO(image.read()), "")
    except Exception:  # noqa: BLE001 - Pillow's parsers raise anything; decoding the image names the reason
        return False


def _is_whole(file: IO[bytes], name: str) -> bool:
    opened = open_file(file, name)
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read()
    if opened.mode not in PLAIN_MODES:
        return False
    if opened.format == "JPEG":
        return tail.rstrip(b"\0\r\n").endswith(JPEG_END)
    if opened.format == "PNG":
        return tail.endswith(PNG_END)
    file.seek(4)
    return opened.format == "WEBP" and int.from_bytes(file.read(4), "little") + 8 <= size


class CheckedImages:
    """Images that an earlier run has checked, by path, size and time of the file.

    Args:
        folder: Holds arrays of 8-byte hashes; created if absent. Several processes may share it.
        how: Name of the check.
    """

    def __init__(self, folder: Path, how: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.how = folder, how
        self._stamps: dict[str, str] = {}
        files = list(folder.glob(f"{how}-*.npy"))
        parts = [part for part in map(_read, files) if part is not None]
        self._known = np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))
        if len(files) > MAX_FILES:
            self.add(self._known.tolist())
            for file in files:
                file.unlink(missing_ok=True)

    def keys(self, images: Sequence[ImageRef]) -> np.ndarray:
        """A hash of each image's path, size and time, [N]; 0 if there is no such file."""
        return np.array([self._key(image) for image in images], np.uint64)

    def known(self, keys_N: np.ndarray) -> np.ndarray:
        """Whether each key was checked by an earlier run, [N]."""
        if not len(self._known):
            return np.zeros(len(keys_N), bool)
        places = np.searchsorted(self._known, keys_N).clip(max=len(self._known) - 1)
        return np.asarray((self._known[places] == keys_N) & (keys_N != 0))

    def add(self, keys: Iterable[int]) -> None:
        """Remembers images for later runs."""
        found = np.fromiter(keys, np.uint64)
        if len(found):
            with replacing(self.folder / f"{self.how}-{uuid.uuid4().hex[:12]}.npy") as beside:
                np.save(beside, found)

    def _key(self, image: ImageRef) -> int:
        if image.path is None:
            return 0
        stamp = self._stamp(image.path) if image.member is None else self._archive(image.path)
        if not stamp:
            return 0
        name = f"{os.path.abspath(image.path)}\0{image.member or ''}\0{stamp}"  # noqa: PTH100 - a million times
        return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "little")

    def _archive(self, path: str) -> str:
        if path not in self._stamps:
            self._stamps[path] = self._stamp(path)
        return self._stamps[path]

    @staticmethod
    def _stamp(path: str) -> str:
        try:
            about = os.stat(path)  # noqa: PTH116
        except OSError:
            return ""
        return f"{about.st_size} {about.st_mtime_ns}"


def _read(file: Path) -> np.ndarray | None:
    """Hashes of a file; None if another process has merged it or it is damaged: its images are checked again."""
    try:
        found: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.uint64 and found.ndim == 1 else None


def first_error(image: ImageRef, decode: bool) -> UserError | None:
    """Why an image cannot be read; None if it can.

    Args:
        image: The image.
        decode: Decode it as a whole, instead of looking at its header and end mark.
    """
    try:
        if decode:
            image.load()
        else:
            check_ends(image)
    except UserError as error:
        return error
    return None
