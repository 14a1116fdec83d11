"""Golden vectors: eight fixed inputs whose vectors are saved with a checkpoint, so that any machine can verify it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vlm2vec.errors import UserError, shown
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.model import Compact
from vlm2vec.models.backbones.compact.weights import SHIPPED
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.loading import family_of
from vlm2vec.types import EmbeddingInput

GOLDEN_FILE = "golden.safetensors"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def golden_inputs() -> list[EmbeddingInput]:
    """Returns four texts, two images and two inputs with both, the same for every model and version."""
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


def ordered_inputs() -> list[EmbeddingInput]:
    """Returns inputs whose order of text and images matters: text first, two images, text between images."""
    first, second = _gradient((40, 56), 4), _gradient((64, 48), 5)
    return [
        EmbeddingInput(text="in red", images=(first,), text_first=True),
        EmbeddingInput(text="which one is larger?", images=(first, second)),
        EmbeddingInput(text="which one is larger?", images=(first, second), text_first=True),
        EmbeddingInput(text="<|image_1|>is left of<|image_2|>", images=(first, second)),
    ]


def write_golden(embedder: Embedder, folder: Path) -> None:
    """Encodes the golden inputs and saves the vectors next to the weights, with the precision of the computation.

    The precision is that of the base weights; autocast is disabled, even for a model that was trained with autocast.
    """
    with _without_autocast(embedder):
        vectors = torch.from_numpy(embedder.encode(golden_inputs(), batch_size=1))
    precision = str(embedder.dtype).removeprefix("torch.")
    save_file({"embeddings": vectors}, folder / GOLDEN_FILE, metadata={"precision": precision})


def golden_folder(source: Path) -> Path:
    """The folder of a model's golden vectors: the checkpoint itself, or for a built-in model that of its weights."""
    is_built_in = str(source) == Compact.name and not (source / EMBEDDER_FILE).is_file()
    return SHIPPED.parent if is_built_in else source


def golden_dtype(folder: Path) -> torch.dtype:
    """Returns the precision in which a folder's golden vectors were computed; float32 if the file does not record it.

    Raises:
        UserError: if the folder is not a checkpoint, has no golden file, or has another precision than float32,
            bfloat16 or float16.
    """
    path = folder / GOLDEN_FILE
    if not path.is_file():
        family = family_of(str(folder))  # raises if the folder is not a checkpoint at all
        raise UserError(
            f"{folder}: the checkpoint of {family.name} has no {GOLDEN_FILE}, which vlm2vec train and export write; "
            "compare it with another library: --against sentence-transformers"
        )
    try:
        with safe_open(path, "pt") as file:
            precision = (file.metadata() or {}).get("precision", "float32")
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    if precision not in PRECISIONS:
        raise UserError(f"{path}: precision {shown(precision)}: expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def verify_golden(embedder: Embedder, folder: Path) -> np.ndarray:
    """Returns the cosines between the recomputed and the saved vectors, shape [8].

    Args:
        embedder: The embedder, in the precision of `golden_dtype`.
        folder: The folder of the vectors.

    Raises:
        UserError: as `golden_dtype`.
    """
    golden_dtype(folder)
    saved = load_file(folder / GOLDEN_FILE)["embeddings"].numpy()
    return np.asarray((embedder.encode(golden_inputs(), batch_size=1) * saved).sum(axis=1))


@contextmanager
def _without_autocast(embedder: Embedder) -> Iterator[None]:
    """Context manager that restores the plain `forward`, which training replaces by a version under autocast."""
    replaced = vars(embedder).pop("forward", None)
    try:
        with torch.autocast(embedder.device.type, enabled=False):
            yield
    finally:
        if replaced is not None:
            vars(embedder)["forward"] = replaced


def _gradient(size: tuple[int, int], phase: int) -> ImageRef:
    width, height = size
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(across * (3 + phase)) % 256, (down * (5 + phase)) % 256, (across + down + 40 * phase) % 256]
    return ImageRef.of(Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)))
