"""Images that travel as bytes give the vectors of images that travel as float32 pixel values, in every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.models import FAMILIES

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.media.images import ImageRef
from vlm2vec.models.vision.raw_pixels import RAW, REAL, Pixels, RawPixels

# Tiles or images are padded with zeros, by the processor or in a batch: a mask travels with the bytes.
PADDED = {"llava_next", "llava_onevision", "mllama", "mistral3", "idefics3", "smolvlm"}


def inputs() -> list[EmbeddingInput]:
    noise = np.random.default_rng(3)
    images = [
        ImageRef.of(Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)))
        for size in ((50, 70, 3), (33, 120, 3), (140, 64, 3))
    ]
    alone = [EmbeddingInput("look", (image,)) for image in images]
    return [*alone, EmbeddingInput("both", (images[0], images[2])), EmbeddingInput("no image")]


@pytest.mark.parametrize("family", [*FAMILIES, "phi3_v"])
def test_bytes_give_the_vectors_of_pixel_values(family: str, tiny_vlm: Callable[[str], Path]) -> None:
    folder = Path(__file__).parents[1] / "golden/phi3v" if family == "phi3_v" else tiny_vlm(family)
    embedder = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu")
    items = inputs()
    numbers = embedder.backbone.process(items)
    with torch.inference_mode():
        before = embedder(numbers)
    assert embedder.backbone.send_bytes()
    bytes_ = embedder.backbone.process(items)
    size, after = numbers["pixel_values"].nbytes, bytes_["pixel_values"].nbytes
    assert bytes_["pixel_values"].dtype is torch.uint8
    assert after * 4 < size if family == "phi3_v" else after * 4 == size  # its small copies are made on the device
    masks = bytes_.get(REAL)
    assert (masks is not None) == (family in PADDED)
    assert masks is None or masks.nbytes * 3 == after
    with torch.inference_mode():  # in one batch: `encode` would take a refused one apart
        np.testing.assert_allclose(embedder(bytes_).numpy(), before.numpy(), rtol=0, atol=2e-6)


def processor(change: Callable[[torch.Tensor], torch.Tensor], pad: int = 0) -> Pixels:
    """An image processor that changes bytes in its own way and then pads with zeros."""

    def pixels(images: Sequence[Image.Image], settings: dict[str, Any]) -> torch.Tensor:
        bytes_ = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in images]
        values = [one if settings == RAW else one.float() + 1 if settings else change(one.float()) for one in bytes_]
        side = max(max(one.shape[-2:]) for one in values) + pad
        missing = [(0, side - one.shape[-1], 0, side - one.shape[-2]) if pad else (0, 0) for one in values]
        return torch.cat([torch.nn.functional.pad(one, gap) for one, gap in zip(values, missing, strict=True)])

    return pixels


def test_scale_shift_and_padding_are_measured_and_anything_else_is_found_out() -> None:
    std = torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    padded = RawPixels.of(processor(lambda one: (one / 255 - 0.5) / std, pad=8))
    assert padded is not None and padded.padded and padded.scale.shape == (3, 1, 1)
    torch.testing.assert_close(padded.shift, (-0.5 / std)[0])
    assert RawPixels.of(processor(lambda one: (one / 255) ** 2, pad=8)) is None
