"""Images as bytes from the workers to the device: a quarter of what the processor's numbers take, and less work.

After resizing, a family's image processor computes number = byte * scale + shift, by channel. Which scale and shift,
and in which layout of patches or tiles, is asked of the processor itself, with a black and a white image; whether
that is all it does, with noise. Where it is not (padding that is not an image's, other steps), images stay numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

RAW = {"do_rescale": False, "do_normalize": False}
"""What tells transformers' image processors to leave bytes as they are."""
SIZES = ((40, 56), (90, 30), (200, 120))
CLOSE = 2e-6  # numbers are about -2.5 to 2.5 in float32
Pixels = Callable[[Image.Image, bool], torch.Tensor]


@dataclass
class RawPixels:
    """Bytes -> the processor's numbers; both tensors broadcast against any image of the family."""

    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, pixels: Pixels) -> RawPixels | None:
        """Finds scale and shift; None where the numbers are not made so.

        Args:
            pixels: (image, whether as bytes) -> what the processor makes of it.
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
            if given.dtype is not torch.uint8 or (found.numbers(given) - wanted).abs().max() > CLOSE:
                return None
        return found

    def numbers(self, given: torch.Tensor) -> torch.Tensor:
        """The processor's numbers in float32, on the device of the bytes."""
        self.scale, self.shift = self.scale.to(given.device), self.shift.to(given.device)
        return given.float() * self.scale + self.shift


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """What a processor that was told `RAW` gives, as bytes; as it is where it holds anything else."""
    if pixels.dtype is torch.uint8:
        return pixels
    rounded = pixels.round().clamp(0, 255)
    return rounded.to(torch.uint8) if torch.equal(rounded, pixels) else pixels


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with every dimension along which it does not change cut to one."""
    for dim in range(tensor.dim()):
        first = tensor.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(tensor), tensor):
            tensor = first
    return tensor.clone()
