"""Images as bytes from the workers to the device: less memory than float32 pixel values, and less work.

After resizing, a family's image processor computes `value = byte * scale + shift` per channel. Scale, shift and the
layout of patches or tiles are measured with a black and a white image, and checked with noise. Some processors then pad
tiles or whole images with zeros, which no byte stands for. Of these, a mask of the real pixels travels with the bytes.
If a processor does anything else, images stay float32 pixel values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

RAW: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
"""Settings with which transformers' image processors return bytes."""
SHIFTED: dict[str, Any] = {"do_rescale": False, "do_normalize": True, "image_mean": [-1.0] * 3, "image_std": [1.0] * 3}
"""Settings with which they return byte + 1, and padding stays 0."""
REAL = "real_pixels"
"""Name of the mask of pixels that are not padding, beside `pixel_values`."""
SIZES = ((40, 56), (90, 30), (200, 120))
CLOSE = 2e-6  # pixel values are about -2.5 to 2.5 in float32
Pixels = Callable[[Sequence[Image.Image], dict[str, Any]], torch.Tensor]


@dataclass
class RawPixels:
    """Converts bytes to pixel values. Both tensors broadcast against any image of the family.

    Attributes:
        scale: Factor of a byte.
        shift: Pixel value of byte 0.
        padded: Whether the processor pads with zeros; channels are then the third dimension from the end.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    padded: bool

    @classmethod
    def of(cls, pixels: Pixels) -> RawPixels | None:
        """Measures scale and shift. None if the processor does anything else.

        Args:
            pixels: (images of one input, settings of the image processor) -> its pixel values. {}: as they are.
        """
        for padded in (False, True):
            try:
                found = cls._measured(pixels, padded)
            except (IndexError, RuntimeError, ValueError):  # shapes of a layout that is not supported
                continue
            if found is not None:
                return found
        return None

    @classmethod
    def _measured(cls, pixels: Pixels, padded: bool) -> RawPixels | None:
        noise = np.random.default_rng(0)
        found: RawPixels | None = None
        shapes = set()
        for sizes in (*((size,) for size in SIZES), (SIZES[0], SIZES[2])):
            black, white = (pixels([Image.new("RGB", size, (value,) * 3) for size in sizes], {}) for value in (0, 255))
            shapes.add(black.shape[1:])
            real = pixels([Image.new("RGB", size) for size in sizes], SHIFTED) > 0 if padded else None
            if real is None:
                scale, shift = _shared((white - black) / 255), _shared(black)
            else:  # pixels that the processor adds before it scales and shifts have a color of their own
                shift = _by_channel(black, real).amin(dim=1)[:, None, None]
                scale = (_by_channel(white, real).amax(dim=1)[:, None, None] - shift) / 255
            found = found or cls(scale, shift, padded)
            if scale.shape != found.scale.shape or not torch.equal(shift, found.shift):
                return None
            arrays = [noise.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
            images = [Image.fromarray(array) for array in arrays]
            packed = found.packed(pixels(images, found.settings))
            is_bytes = packed["pixel_values"].dtype is torch.uint8
            if not is_bytes or (found.pixel_values(**packed) - pixels(images, {})).abs().max() > CLOSE:
                return None
        # A batch pads rows of different shapes with zeros, which would be black as bytes.
        return found if padded or len(shapes) == 1 else None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the image processor that `packed` expects."""
        return SHIFTED if self.padded else RAW

    def packed(self, raw: torch.Tensor) -> dict[str, torch.Tensor]:
        """Bytes and, if the processor pads, the mask, from the processor's output with `settings`."""
        if not self.padded:
            return {"pixel_values": as_bytes(raw)}
        return {"pixel_values": as_bytes((raw - 1).clamp(min=0)), REAL: (raw > 0).any(dim=-3, keepdim=True)}

    def pixel_values(self, pixel_values: torch.Tensor, real_pixels: torch.Tensor | None = None) -> torch.Tensor:
        """The processor's pixel values in float32, on the device of the bytes.

        A single value expanded to the shape stands for pixel values that the model does not read; it is returned.
        """
        if not any(pixel_values.stride()):
            return pixel_values
        self.scale, self.shift = self.scale.to(pixel_values.device), self.shift.to(pixel_values.device)
        values = pixel_values.float() * self.scale + self.shift
        return values if real_pixels is None else values * real_pixels


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixel values between 0 and 255 as bytes; unchanged if any of them is not a byte."""
    if pixels.dtype is torch.uint8:
        return pixels
    rounded = pixels.round().clamp(0, 255)
    return rounded.to(torch.uint8) if torch.equal(rounded, pixels) else pixels


def _by_channel(tensor: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The values where `real`, [C, N]."""
    return tensor.movedim(-3, 0)[real.movedim(-3, 0)].view(tensor.shape[-3], -1)


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with every dimension along which it is constant reduced to size 1."""
    for dim in range(tensor.dim()):
        first = tensor.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(tensor), tensor):
            tensor = first
    return tensor.clone()
