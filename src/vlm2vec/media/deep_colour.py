"""TIFF images with 16 bits per colour channel, of which Pillow keeps the upper 8.

Cameras and microscopes store 10 or 12 bits in these 16, so that the upper 8 alone are almost black.
"""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import numpy as np
from PIL import Image

from vlm2vec.errors import UserError

DEEP = re.compile(r"(?:RGB|RGBA|RGBX|CMYK);16([BLN])")
"""Pillow's names of pixel layouts with 16 bits per channel, and the byte order: big, little, native."""
PREMULTIPLIED = "RGBa;16"
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
BITS_PER_SAMPLE, PLANAR_CONFIGURATION, SEPARATE = 258, 284, 2
"""Two TIFF tags, and the value of the second for channels that are stored one after the other."""


class DeepColour:
    """The encoded file of an image with 16 bits per channel.

    Args:
        image: An opened TIFF image that is not loaded yet: loading closes its file.
        layout: Pillow's name of its pixel layout.
    """

    def __init__(self, image: Any, layout: str) -> None:
        self._layout, self._frame = layout, image.tell()
        place = image.fp.tell()
        image.fp.seek(0)
        self._raw = image.fp.read()
        image.fp.seek(place)

    @staticmethod
    def of(image: Any) -> DeepColour | None:
        """The file of an image; None unless it is a TIFF image with 16 bits per colour channel that is not loaded yet.

        Raises:
            UserError: for channels that are stored one after the other, which Pillow reads as 8 bits.
        """
        tiles = getattr(image, "tile", ()) if image.format == "TIFF" else ()
        if not tiles:
            return None
        bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
        if bits > 8 and image.tag_v2.get(PLANAR_CONFIGURATION) == SEPARATE and len(tiles) > 1:
            raise UserError(f"{bits} bits per channel in separate planes are not supported; save it with 8 bits")
        layout = _layout(tiles[0].args)
        return DeepColour(image, layout) if DEEP.fullmatch(layout) or layout.startswith(PREMULTIPLIED) else None

    def lower_bytes(self) -> np.ndarray:
        """The lower 8 bits of each value, uint8 [H, W, C]: the file is decoded with the other byte order.

        Raises:
            UserError: for colours that are multiplied by their transparency, which Pillow divides while it decodes.
        """
        known = DEEP.fullmatch(self._layout)
        if known is None:
            raise UserError(
                "premultiplied colours of 16 bits that use fewer are not supported; save the image with 8 bits"
            )
        with Image.open(io.BytesIO(self._raw)) as again:
            again.seek(self._frame)
            other = self._layout[:-1] + OTHER_ORDER[known[1]]
            again.tile = [tile._replace(args=_with_layout(tile.args, other)) for tile in again.tile]
            return np.asarray(again)


def _layout(args: Any) -> str:
    return str(args[0] if isinstance(args, tuple) else args)


def _with_layout(args: Any, layout: str) -> Any:
    return (layout, *args[1:]) if isinstance(args, tuple) else layout
