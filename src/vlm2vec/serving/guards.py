"""Checks of an input before any library decodes it."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from vlm2vec.media.data_uris import is_data_uri
from vlm2vec.media.images import ImageRef
from vlm2vec.serving.refusals import Refusal
from vlm2vec.types import EmbeddingInput

if TYPE_CHECKING:
    from vlm2vec.serving.settings import ServeSettings

# Formats that Pillow decodes itself; for others, such as EPS, it starts programs or reads further files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


@dataclass(frozen=True)
class InputLimits:
    """Limits of one input; see `ServeSettings`."""

    max_chars: int
    max_tokens: int
    max_images: int
    max_pixels: int
    max_image_bytes: int

    @classmethod
    def of(cls, settings: ServeSettings) -> InputLimits:
        """The limits in the settings of a server."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})

    def check(self, item: EmbeddingInput) -> Refusal | None:
        """Return the reason why an input is refused, or None; of images only the header is read."""
        for text in (item.text, item.instruction):
            if refusal := self._check_text(text or ""):
                return refusal
        if not (item.text or item.images):
            return Refusal(400, "empty_input", "the input is empty; expected text, an image or both")
        if len(item.images) > self.max_images:
            return Refusal(
                413,
                "too_many_images",
                f"the input has {len(item.images)} images; at most {self.max_images} are allowed",
            )
        return next((refusal for image in item.images if (refusal := self.check_image(image.read()))), None)

    def _check_text(self, text: str) -> Refusal | None:
        if len(text) > self.max_chars:
            return Refusal(
                413, "text_too_long", f"the text has {len(text)} characters; at most {self.max_chars} are allowed"
            )
        if is_data_uri(text):
            return Refusal(400, "bad_text", "the text begins like a data URI; send it as an image")
        try:
            text.encode()
        except UnicodeEncodeError:
            return Refusal(400, "bad_text", "the text contains a lone surrogate, which is not a valid character")
        return None

    def check_image(self, data: bytes) -> Refusal | None:
        """Return the reason why an image file is refused, or None; pixels are not decoded."""
        if len(data) > self.max_image_bytes:
            return Refusal(
                413, "image_too_large", f"the image has {len(data)} bytes; at most {self.max_image_bytes} are allowed"
            )
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            width, height = self.max_pixels, 2
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, OverflowError):
            return Refusal(400, "bad_image", f"not an image in a supported format ({', '.join(FORMATS)})")
        if width * height > self.max_pixels:
            return Refusal(413, "image_too_large", f"the image has more than {self.max_pixels} pixels")
        return None


def read_below(root: Path | None, name: str, max_bytes: int) -> ImageRef | Refusal:
    """Read the image at a path below `root`; error messages then contain no path of this machine.

    Args:
        root: The media root; paths and symbolic links that lead out of it are refused. None: all paths are refused.
        name: Path relative to `root`.
        max_bytes: Maximum size of the file.
    """
    if root is None:
        return Refusal(
            403,
            "paths_not_allowed",
            "this server reads no files; send a data URI, or start the server with --media-root FOLDER",
        )
    outside = Refusal(403, "path_outside", "the path is not a file below the media root")
    try:
        base = root.resolve(strict=True)
        path = (base / name).resolve(strict=True)
        if not path.is_relative_to(base) or not path.is_file():
            return outside
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError, RuntimeError):  # missing, unreadable, NUL bytes, a loop of links
        return outside
    return replace(ImageRef.of(data), origin="image below the media root")
