"""The built-in model in a small size, and inputs of every kind for it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlm2vec import EmbeddingInput
from vlm2vec.media.images import ImageRef

SMALL = {"num_layers": 2, "visual_tokens": 4, "image_size": 64}


def draw_image(seed: int, size: tuple[int, int] = (48, 40)) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    return ImageRef.of(Image.fromarray(pixels))


def mixed_inputs() -> list[EmbeddingInput]:
    return [
        EmbeddingInput(text="a"),
        EmbeddingInput(images=(draw_image(0),)),
        EmbeddingInput(text="a much longer text that pads the others " * 3),
        EmbeddingInput(text="between <|image_1|> and <|image_2|>", images=(draw_image(1), draw_image(2, (90, 20)))),
        EmbeddingInput(text="what is it?", images=(draw_image(0),), instruction="Answer"),
    ]
