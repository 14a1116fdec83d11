"""Images as bytes from the workers to the device: a quarter of the memory of float32 pixel values, and less work.

After resizing, a family's image processor computes `value = byte * scale + shift` per channel. Scale, shift and the
layout of patches or tiles are measured with a black and a white image, and checked with noise. If a processor does
anything else (padding that is not part of the image, other steps), images stay float32 pixel values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

RAW = {"do_rescale": False, "do_normalize": False}
"""Settings with which transformers' image processors return bytes."""
SIZES = ((40, 56), (90, 30), (200, 120))
CLOSE = 2e-6  # pixel values are about -2.5 to 2.5 in float32
Pixels = Callable[[Image.Image, bool], torch.Tensor]


@dataclass
class RawPixels:
    """Converts bytes to pixel values. Both tensors broadcast against any image of the family."""

    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, pixels: Pixels) -> RawPixels | None:
        """Measures scale and shift. None if the processor does anything else.

        Args:
            pixels: (image, whether as bytes) -> the processor's output.
        """
        found: RawPixels | None = None
        noise = np.random.default_rng(0)
        for width, height in SIZES:
            black, white = (pixels(Image.new("RGB", (width, height), (v,) * 3), False) for v in (0, 255))
            here = cls(_shared((white - black) / 255), _shared(black))
            if found is None:
                found = here
            if here.scale.shape != found.scale.shape or not torch.equal(here.shift, found.shift):
                return None
            image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
            wanted, given = pixels(image, False), pixels(image, True)
            if given.dtype is not torch.uint8 or (found.pixel_values(given) - wanted).abs().max() > CLOSE:
                return None
        return found

    def pixel_values(self, given: torch.Tensor) -> torch.Tensor:
        """The processor's pixel values in float32, on the device of the bytes."""
        self.scale, self.shift = self.scale.to(given.device), self.shift.to(given.device)
        return given.float() * self.scale + self.shift


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixel values of a processor called with `RAW` as bytes; unchanged if any of them is not a byte."""
    if pixels.dtype is torch.uint8:
        return pixels
    rounded = pixels.round().clamp(0, 255)
    return rounded.to(torch.uint8) if torch.equal(rounded, pixels) else pixels


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with every dimension along which it is constant reduced to size 1."""
    for dim in range(tensor.dim()):
        first = tensor.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(tensor), tensor):
            tensor = first
    return tensor.clone()
