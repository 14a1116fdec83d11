"""Eight inputs and their vectors, saved with a checkpoint: whoever loads it can check that it gives the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.embedder import Embedder
from vlm2vec.types import EmbeddingInput

GOLDEN_FILE = "golden.safetensors"


def golden_inputs() -> list[EmbeddingInput]:
    """Four texts, two images and two of both, the same for every model and version."""
    images = [_gradient(size, phase) for size, phase in (((64, 64), 0), ((96, 48), 1), ((50, 80), 2), ((33, 33), 3))]
    texts = ["a dog on the beach", "Zürich", "What is left of the tree?", "one two three four five six seven eight"]
    task = "Represent the given image for classification"
    return [
        *(EmbeddingInput(text=text) for text in texts),
        EmbeddingInput(images=(images[0],)),
        EmbeddingInput(images=(images[1],), instruction=task),
        EmbeddingInput(text="in red", images=(images[2],)),
        EmbeddingInput(text=f"<|image_1|>\n{task}\n", images=(images[3],)),
    ]


def write_golden(embedder: Embedder, folder: Path) -> None:
    """Encodes the golden inputs in float32 and writes them beside the weights."""
    vectors = torch.from_numpy(embedder.encode(golden_inputs(), batch_size=1))
    save_file({"embeddings": vectors}, folder / GOLDEN_FILE)


def verify_golden(embedder: Embedder, folder: Path) -> np.ndarray:
    """Cosines of the vectors made now to the saved ones, shape [8].

    Raises:
        UserError: if the folder has no golden file.
    """
    path = folder / GOLDEN_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing; only folders that this project wrote can be verified")
    saved = load_file(path)["embeddings"].numpy()
    return np.asarray((embedder.encode(golden_inputs(), batch_size=1) * saved).sum(axis=1))


def _gradient(size: tuple[int, int], phase: int) -> ImageRef:
    width, height = size
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(across * (3 + phase)) % 256, (down * (5 + phase)) % 256, (across + down + 40 * phase) % 256]
    return ImageRef.of(Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)))
