"""Images that travel as bytes give the vectors of those that travel as numbers, in every family that can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.models import FAMILIES

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.media.images import ImageRef
from vlm2vec.models.vision.raw_pixels import RawPixels

# Tiles or images padded with numbers of zero, by the processor or in a batch.
CANNOT = {"llava_next", "llava_onevision", "mllama", "mistral3", "idefics3", "smolvlm"}


def inputs() -> list[EmbeddingInput]:
    noise = np.random.default_rng(3)
    images = [
        ImageRef.of(Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)))
        for size in ((50, 70, 3), (33, 120, 3), (140, 64, 3))
    ]
    alone = [EmbeddingInput("look", (image,)) for image in images]
    return [*alone, EmbeddingInput("both", (images[0], images[2])), EmbeddingInput("no picture")]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_give_the_vectors_of_numbers(family: str, tiny_vlm: Callable[[str], Path]) -> None:
    embedder = Embedder.from_pretrained(tiny_vlm(family), dtype=torch.float32, device="cpu")
    items = inputs()
    numbers = embedder.backbone.process(items)
    with torch.inference_mode():
        before = embedder(numbers)
    able = embedder.backbone.send_bytes()
    bytes_ = embedder.backbone.process(items)
    size, after = numbers.tensors, bytes_.tensors
    assert able == (family not in CANNOT)
    if able:
        assert after["pixel_values"].dtype is torch.uint8
        assert after["pixel_values"].nbytes * 4 == size["pixel_values"].nbytes
    else:
        assert all(tensor.dtype is size[name].dtype for name, tensor in after.items())
    with torch.inference_mode():  # in one batch: `encode` would take a refused one apart
        np.testing.assert_allclose(embedder(bytes_).numpy(), before.numpy(), rtol=0, atol=2e-6)


def test_a_processor_that_pads_or_does_anything_else_is_found_out() -> None:
    def pads(image: Image.Image, raw: bool) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        numbers = pixels if raw else (pixels.float() / 255 - 0.5) / 0.25
        return torch.nn.functional.pad(numbers, (0, 8))

    def squares(image: Image.Image, raw: bool) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return pixels if raw else (pixels.float() / 255) ** 2

    def scales(image: Image.Image, raw: bool) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return pixels if raw else (pixels.float() / 255 - 0.5) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)

    assert RawPixels.of(pads) is None and RawPixels.of(squares) is None
    found = RawPixels.of(scales)
    assert found is not None and found.scale.shape == (1, 3, 1, 1)
