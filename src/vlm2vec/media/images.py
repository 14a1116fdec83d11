"""References to images that are not decoded yet: location, reading, and a digest of the content.

Dataset readers create `ImageRef`s for millions of rows without opening a file; batching decodes the images.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageFile, UnidentifiedImageError

from vlm2vec.errors import UserError, shown
from vlm2vec.media import archives, documents
from vlm2vec.media.data_uris import data_uri_bytes, is_data_uri
from vlm2vec.media.pixels import PixelRules, prepare, upright

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".heic", ".heif", ".ppm", ".pgm", ".pnm", ".tga",
)  # fmt: skip
"""File name endings of images that Pillow reads; HEIC requires the extra `heic`."""
MAX_PATH = 300
"""Characters of a path in a message; a longer text is no path."""
NOT_DECODED = ("EPS", "MPEG")
"""Formats that Pillow gives to another program (Ghostscript, which runs code of the file) or knows by header only."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image by reference: a file, a member of a zip or tar, or bytes.

    Attributes:
        path: The file, or the archive that contains `member`.
        member: Name inside the archive at `path`; None for a plain file.
        data: Bytes of the encoded file, if there is no path.
        origin: Source of the reference (`file, row 3, field qry_image_path`), for error messages.
        rules: Preprocessing rules of an evaluation; None: see `load`.
    """

    path: str | None = None
    member: str | None = None
    data: bytes | None = None
    origin: str = field(default="", compare=False)
    rules: PixelRules | None = None

    @staticmethod
    def of(source: Any) -> ImageRef:
        """Creates a reference from a path, `data:` URI, bytes, PIL image or another reference.

        A PIL image is turned by its EXIF orientation, as its file is.

        Raises:
            UserError: for a URL (URLs are not fetched), an unsupported type, or a PIL image that is empty,
                damaged or of an unsupported mode.
        """
        if isinstance(source, ImageRef):
            return source
        if isinstance(source, Image.Image):
            return ImageRef(data=_encoded(source))
        if isinstance(source, bytes):
            return ImageRef(data=source)
        if isinstance(source, str) and is_data_uri(source):
            return ImageRef(data=_decode_data_uri(source))
        if isinstance(source, str) and is_url(source):
            raise UserError(f"image {shown(source)}: URLs are not fetched; download the image and pass its path")
        if isinstance(source, str | os.PathLike):
            return ImageRef(path=os.fspath(source))
        raise UserError(f"image of type {type(source).__name__}: expected a path, bytes, data URI or PIL image")

    def exists(self) -> bool:
        """Returns whether the file or archive member exists; nothing is decoded."""
        if self.path is None:
            return True
        if self.member is None:
            return Path(self.path).is_file()
        return Path(self.path).is_file() and archives.has_member(self.path, self.member)

    def read(self) -> bytes:
        """Reads the encoded bytes of the image.

        Raises:
            UserError: if the file or archive member is missing, or the archive is damaged.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            if self.member is None:
                return Path(self.path).read_bytes()
            return archives.read_member(self.path, self.member)
        except UserError as error:
            raise UserError(f"{self.origin}: {error}" if self.origin else str(error)) from error
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            raise UserError(f"{self}: the image file is missing") from error

    def is_rendered(self) -> bool:
        """Whether this is a PDF page or a video frame, whose rendering is as expensive as encoding it."""
        return self.path is not None and self.member is not None and documents.is_document(self.path)

    def digest(self) -> str:
        """SHA-256 of the content and of `rules`: equal images have equal digests, independent of their location.

        Raises:
            UserError: as `read`.
        """
        if self.is_rendered():
            assert self.path is not None and self.member is not None
            found = documents.digest(self.path, self.member)  # rendering a page costs far more than hashing its file
        else:
            found = hashlib.sha256(self.read()).hexdigest()
        if self.rules is None or not self.rules.tag():
            return found
        return hashlib.sha256(f"{found} {self.rules.tag()}".encode()).hexdigest()

    def load(self) -> Image.Image:
        """Decodes the image to RGB, upright by its EXIF orientation and composited onto white, or by `rules`.

        Raises:
            UserError: if the image is missing, truncated, or has an unknown format or unsupported mode.
        """
        raw = self.read()
        try:
            with open_image(raw, str(self.path or "")) as image:
                return prepare(image, self.rules)
        except UserError as error:
            raise UserError(f"{self}: {error}") from error
        except UnidentifiedImageError as error:  # its message only contains the repr of a BytesIO
            raise UserError(f"{self}: not a readable image (unknown format); replace or remove it") from error
        except Exception as error:  # damaged files make PIL's parsers raise anything (struct.error, KeyError, …)
            raise UserError(f"{self}: not a readable image ({error}); replace or remove it") from error

    def __str__(self) -> str:
        path = self.path or ""
        if len(path) > MAX_PATH or not path.isprintable():  # base64 instead of a path, perhaps; or a null byte
            path = shown(path)
        place = f"{path}:{self.member}" if self.member else path or "image in memory"
        return f"{self.origin}: {place}" if self.origin else place


def is_url(text: str) -> bool:
    """Whether a string is a URL of any scheme, such as `https://`, `file://` or `s3://`."""
    return URL.match(text) is not None


def image_beside(table: Path, name: str, origin: str) -> ImageRef:
    """An image that a table names: a data URI, or a path relative to the table.

    Raises:
        UserError: for a URL.
    """
    if is_data_uri(name) or is_url(name):
        return replace(ImageRef.of(name), origin=origin)
    return ImageRef(path=str(table.parent / name), origin=origin)


def named_images(value: Mapping[str, Any]) -> list[Any]:
    """What an object gives as `image` or `images`, which may both be one image or a list.

    Raises:
        UserError: if it has both, because the images of one of them would be lost.
    """
    given = [_listed(value.get(name)) for name in ("image", "images")]
    if all(given):
        raise UserError("input has both image and images; put all images into images")
    return [*given[0], *given[1]]


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def open_image(raw: bytes, name: str = "") -> Image.Image:
    """Opens an encoded image with Pillow, including HEIC; only the header is decoded. See `open_file`."""
    return open_file(io.BytesIO(raw), name)


def open_file(file: IO[bytes], name: str = "") -> Image.Image:
    """Opens an encoded image with Pillow, including HEIC; only the header is read.

    Args:
        file: The encoded file, at its beginning; stays open.
        name: File name; its ending distinguishes a damaged HEIC file from other formats.

    Raises:
        UserError: for HEIC images if pillow-heif is not installed, and for formats that Pillow recognizes and does not
            decode itself.
        UnidentifiedImageError, OSError and others: from Pillow, for a damaged file or an unknown format.
    """
    head = file.read(12)
    file.seek(0)
    if (head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS) or name.lower().endswith((".heic", ".heif")):
        try:
            import pillow_heif
        except ImportError as error:
            raise UserError("HEIC images require pillow-heif: pip install 'vlm2vec[heic]'") from error
        pillow_heif.register_heif_opener()
    return _decodable(Image.open(file))


def _decodable(image: Image.Image) -> Image.Image:
    if image.format in NOT_DECODED or isinstance(image, ImageFile.StubImageFile):
        raise UserError(f"format {image.format} is not supported; convert the image to PNG or JPEG")
    return image


def _encoded(image: Image.Image) -> bytes:
    """The bytes of a PIL image in a lossless format, the one that is fastest to write and to read."""
    encoded = io.BytesIO()
    try:
        upright(_decodable(image)).save(encoded, format="PPM")
    except UserError:
        raise
    except Exception as error:  # decoding happens here if the image was only opened; see `load`
        raise UserError(f"{shown(image)}: not a readable image ({error}); replace or remove it") from error
    return encoded.getvalue()


def _decode_data_uri(uri: str) -> bytes:
    content = data_uri_bytes(uri)
    if not content:
        raise UserError(f"data URI {shown(uri)}: not valid; expected data:image/...;base64,...")
    return content
