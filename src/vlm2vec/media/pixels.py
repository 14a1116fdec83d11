"""Converts images of every Pillow mode to RGB and applies the resizing rules of published evaluations."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from vlm2vec.errors import UserError
from vlm2vec.media.deep_colour import DeepColour

WIDE_MODES = ("I", "F")
"""First letters of the modes with more than 8 bits per channel: I;16, I;16B, I and F."""
NO_WAY_TO_RGB = ("LAB",)
RANGES = {"I": (255, 1023, 4095, 65535), "F": (1, 255, 1023, 4095, 65535)}
"""Values of white: integers of 8, 10, 12 and 16 bits, and floats from 0 to 1 or with such integers."""
LEAST_OF_RANGE = 16
"""The brightest float value is at least this part of white; no photograph with values up to 255 ends at 1.2."""
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT = 258, 262, 281, 339
"""Numbers of TIFF tags."""
WHITE_IS_ZERO, SIGNED = 0, 2
"""Values of the tags for photometric interpretation and sample format."""
FULL_FROM = 4095 >> 8
"""Larger upper bytes of 16 bits belong to the range up to 65535."""
SMALLEST_SIDE = 28
"""Side of a merged patch of the Qwen-VL models in pixels. The reference evaluation resizes smaller images."""
SMALL_SQUARE = 56
MOST_ASPECT = 200
CAPPED_SQUARE = 980
"""Side of the square to which the published `max_pixels` (1,003,520) limits a larger square, a multiple of 28."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image upright, by EXIF orientation."""


@dataclass(frozen=True, slots=True)
class PixelRules:
    """Preprocessing of decoded images in an evaluation, before the model's processor.

    Attributes:
        plain: Convert to RGB as Pillow does: ignore the EXIF orientation, drop alpha, clip 16-bit grey at 255.
        jpeg: Compress as JPEG (Pillow's default quality 75) first, which is lossy.
        squash: Resize to a square with this side, ignoring the aspect ratio.
        small_images: Resize an image with a side below 28 pixels to 56 x 56, and one with an aspect ratio above 200
            to a square.
        small_frames: Resize a video frame with a side below 28 pixels to a square of its longer side.
        max_pixels: Downscale images with more pixels, keeping the aspect ratio.
    """

    plain: bool = False
    jpeg: bool = False
    squash: int | None = None
    small_images: bool = False
    small_frames: bool = False
    max_pixels: int | None = None

    def tag(self) -> str:
        """String that identifies the rules in a content digest."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value)


def prepare(image: Image.Image, rules: PixelRules | None = None) -> Image.Image:
    """Converts a decoded image to RGB.

    Args:
        image: An image of any mode; better not loaded yet, because 16 bits per colour channel are lost on loading.
        rules: Preprocessing rules. None: apply the EXIF orientation, composite onto white, keep the contrast.

    Raises:
        UserError: for a mode or a value range without a defined conversion to RGB.
    """
    if rules is None:
        return upright(image)
    rgb = _plain_rgb(image) if rules.plain else upright(image)
    if rules.jpeg:
        encoded = io.BytesIO()
        rgb.save(encoded, format="JPEG")
        rgb = Image.open(encoded).convert("RGB")
    size = _size(rgb.size, rules)
    return rgb if size == rgb.size else rgb.resize(size)


def upright(image: Image.Image) -> Image.Image:
    """Returns the image as RGB (`to_rgb`), turned by its EXIF orientation; other EXIF fields are not read.

    Cameras and editors write invalid values into other EXIF fields, which must not prevent an image from loading.

    Raises:
        UserError: as `to_rgb`.
    """
    deep = DeepColour.of(image)
    image.load()  # some formats are turned while they load, and no longer state an orientation then
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - damaged EXIF data makes Pillow raise anything; the pixels are intact
        orientation = None
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    rgb = to_rgb(image if deep is None else _all_bits(image, deep))
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an RGB copy with the contrast of the source; transparent areas become white, as on a web page.

    Values of more than 8 bits (integers, floats) are scaled as the file declares (TIFF: signed values, bits per sample,
    white as 0), otherwise from the narrowest range in `RANGES` that contains them.

    Raises:
        UserError: for a mode or a value range without a defined conversion to RGB.
    """
    if image.mode in NO_WAY_TO_RGB:
        raise UserError(f"mode {image.mode} is not supported; convert the image to RGB")
    if image.mode.startswith(WIDE_MODES) or (image.mode == "L" and _tag(image, SAMPLE_FORMAT) == SIGNED):
        return _narrowed(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _narrowed(image: Image.Image) -> Image.Image:
    """Scales the values of one channel to 8 bits."""
    values = np.asarray(image)
    if image.mode == "L":  # Pillow reads signed bytes as unsigned
        values = values.view(np.int8)
    grey = np.rint(values * (255 / _white_of(values, image))).astype(np.uint8)
    if image.mode != "L" and _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts 8 bits, and no others
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _all_bits(image: Image.Image, deep: DeepColour) -> Image.Image:
    """Scales channels of 16 bits to 8 by the values that they hold, where the upper 8 bits would be almost black."""
    upper = np.asarray(image)
    split = [4 if image.mode == "CMYK" else 3]  # colours, and opacity if there is one
    used = [part.max() for part in np.split(upper, split, axis=-1) if part.size]
    if not _declared_white(image) and min(used, default=FULL_FROM + 1) > FULL_FROM:
        return image
    values = upper.astype(np.uint16) << 8 | deep.lower_bytes()
    parts = [part for part in np.split(values, split, axis=-1) if part.size]
    scaled = [np.rint(part * (255 / _white_of(part, image))).astype(np.uint8) for part in parts]
    return Image.frombytes(image.mode, image.size, np.concatenate(scaled, axis=-1).tobytes())


def _white_of(values: np.ndarray, image: Image.Image) -> int:
    """Returns the value that represents white."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    declared = _declared_white(image)
    for white in (declared,) if declared else RANGES["F" if image.mode == "F" else "I"]:
        # A float range of many steps whose first steps alone are used (0 to 1.2 of 255) is another, unknown range.
        if low >= 0 and high <= white and not (image.mode == "F" and 1 < high < white / LEAST_OF_RANGE):
            return white
    expected = f"0 to {declared}" if declared else "0 to 255 or 0 to 65535"
    raise UserError(
        f"mode {image.mode} with values from {low:g} to {high:g}: expected {expected}; save it with 8 or 16 bits"
    )


def _declared_white(image: Image.Image) -> int | None:
    """The value of white by the tags of a TIFF; None if they do not tell, as 16 bits often hold 8, 10 or 12."""
    bits, highest = _tag(image, BITS_PER_SAMPLE), _tag(image, MAX_SAMPLE_VALUE)
    if not isinstance(bits, int) or image.mode == "F":
        return None
    if _tag(image, SAMPLE_FORMAT) == SIGNED:
        return int(2 ** (bits - 1) - 1) if bits < 32 else None
    if isinstance(highest, int) and 0 < highest < 2 ** min(bits, 16) - 1:
        return int(2 ** highest.bit_length() - 1)
    return int(2**bits - 1) if bits < 16 else None


def _tag(image: Image.Image, number: int) -> Any:
    """A TIFF tag of the image, the first value of several; None if there is no such tag."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _plain_rgb(image: Image.Image) -> Image.Image:
    image.load()  # the mode of some formats changes then
    return image.convert("I").convert("RGB") if image.mode.startswith("I;16") else image.convert("RGB")


def _size(size: tuple[int, int], rules: PixelRules) -> tuple[int, int]:
    if rules.squash:
        size = (rules.squash, rules.squash)
    shorter, longer = min(size), max(size)
    if rules.small_images and shorter < SMALLEST_SIDE:
        return SMALL_SQUARE, SMALL_SQUARE
    if rules.small_images and longer / shorter > MOST_ASPECT:
        return CAPPED_SQUARE, CAPPED_SQUARE
    if rules.small_frames and shorter < SMALLEST_SIDE:
        return longer, longer
    if rules.max_pixels and size[0] * size[1] > rules.max_pixels:
        scale = (rules.max_pixels / (size[0] * size[1])) ** 0.5
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    return size
