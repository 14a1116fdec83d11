"""What an input must keep to before any library decodes it."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from vlm2vec.media.images import ImageRef
from vlm2vec.serving.refusals import Refusal
from vlm2vec.types import EmbeddingInput

if TYPE_CHECKING:
    from vlm2vec.serving.settings import ServeSettings

# Formats that Pillow decodes by itself; others, such as EPS, start programs or read other files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


@dataclass(frozen=True)
class InputLimits:
    """Sizes that one input may have; see `ServeSettings`."""

    max_chars: int
    max_tokens: int
    max_images: int
    max_pixels: int
    max_image_bytes: int

    @classmethod
    def of(cls, settings: ServeSettings) -> InputLimits:
        """The settings' limits."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})

    def check(self, item: EmbeddingInput) -> Refusal | None:
        """Why this input is refused; images by their first bytes alone."""
        for text in (item.text, item.instruction):
            if refusal := self._check_text(text or ""):
                return refusal
        if not (item.text or item.images):
            return Refusal(400, "empty_input", "the input is empty: give text, a picture or both")
        if len(item.images) > self.max_images:
            return Refusal(
                413, "too_many_images", f"{len(item.images)} pictures; at most {self.max_images} are accepted"
            )
        return next((refusal for image in item.images if (refusal := self.check_image(image.read()))), None)

    def _check_text(self, text: str) -> Refusal | None:
        if len(text) > self.max_chars:
            return Refusal(
                413, "text_too_long", f"a text of {len(text)} characters; at most {self.max_chars} are accepted"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            return Refusal(400, "bad_text", "a text holds a lone surrogate, which is no character")
        return None

    def check_image(self, data: bytes) -> Refusal | None:
        """Why these bytes are refused as an image; pixels are not decoded."""
        if len(data) > self.max_image_bytes:
            return Refusal(
                413, "image_too_large", f"a picture of {len(data)} bytes; at most {self.max_image_bytes} are accepted"
            )
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            width, height = self.max_pixels, 2
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, OverflowError):
            return Refusal(400, "bad_image", f"not a picture in one of the formats {', '.join(FORMATS)}")
        if width * height > self.max_pixels:
            return Refusal(413, "image_too_large", f"a picture of more than {self.max_pixels} pixels is not accepted")
        return None


def read_below(root: Path | None, name: str, max_bytes: int) -> ImageRef | Refusal:
    """The image at a path below `root`, read here: messages then name no path of this machine.

    Args:
        root: Symbolic links of `name` that lead out of it are refused.
        name: Relative to `root`.
        max_bytes: Of the file.
    """
    if root is None:
        return Refusal(403, "paths_not_allowed", "paths are not read here; send a data URI (or ask for --media-root)")
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
    return replace(ImageRef.of(data), origin="picture below the media root")
