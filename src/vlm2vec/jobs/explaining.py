"""Which regions of an image carry its match with a query, by occlusion (Zeiler and Fergus, 2014).

A window of the image is covered with the image's mean color, the image is encoded again, and the drop of the cosine is
the window's relevance. Nothing about the model is assumed, so every model can be explained, at one encoding a window.

Shapes: G x G cells.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
from PIL import Image, ImageStat

from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput

TEMPLATE = Path(__file__).with_name("templates") / "explain.html.j2"
WINDOW = 2
"""Side of a window in cells; windows overlap, so a cell's relevance is a mean over up to four of them."""
FINEST = 32
SHOWN = 720
MOST_OPAQUE = 0.8
RED, BLUE = (220, 38, 38), (37, 99, 235)


class Explained(Protocol):
    """Computes the vectors."""

    def encode_query(self, inputs: list[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] of queries."""
        ...

    def encode_document(self, inputs: list[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] of documents."""
        ...


@dataclass(frozen=True)
class Explanation:
    """The match of a query with an image.

    Attributes:
        cosine: Of the query with the whole image.
        drops_GG: Mean drop of the cosine over the windows that cover each cell; negative where covering it raises the
            cosine.
    """

    cosine: float
    drops_GG: np.ndarray


def explain(
    embedder: Explained,
    query: EmbeddingInput,
    image: ImageRef,
    grid: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> Explanation:
    """Covers each window of an image in turn.

    Args:
        embedder: The model.
        query: The query.
        image: The candidate.
        grid: Cells on a side, 2 to 32; (grid - 1)² encodings.
        progress: Called with the number of windows done since the last call.

    Raises:
        UserError: for an unreadable image, or a grid out of range.
    """
    if not WINDOW <= grid <= FINEST:
        raise UserError(f"grid {grid}: expected {WINDOW} to {FINEST} cells on a side")
    whole = image.load()
    query_D = embedder.encode_query([query])[0]

    def cosines(pictures: list[Image.Image]) -> np.ndarray:
        items = [EmbeddingInput(images=(ImageRef.of(picture),)) for picture in pictures]
        return np.asarray(embedder.encode_document(items) @ query_D)

    full = float(cosines([whole])[0])
    gray = tuple(round(value) for value in ImageStat.Stat(whole).mean)
    sums_GG, counts_GG = np.zeros((grid, grid)), np.zeros((grid, grid))
    windows = range(grid - WINDOW + 1)
    for row in windows:
        drops = full - cosines([_covered(whole, row, column, grid, gray) for column in windows])
        for column, drop in zip(windows, drops, strict=True):
            cells = np.s_[row : row + WINDOW, column : column + WINDOW]
            sums_GG[cells] += drop
            counts_GG[cells] += 1
        progress(len(windows))
    return Explanation(full, sums_GG / counts_GG)


def write_explanation(path: Path, title: str, image: ImageRef, found: Explanation) -> None:
    """Writes a page with the image, the overlay and the scale."""
    picture = image.load()
    picture.thumbnail((SHOWN, SHOWN))
    largest = float(np.abs(found.drops_GG).max())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        name=Path(image.member or image.path or "image").name,
        cosine=f"{found.cosine:.3f}",
        largest=f"{largest:.3f}",
        windows=(len(found.drops_GG) - WINDOW + 1) ** 2,
        image=_data_uri(picture),
        overlay=_data_uri(overlay(picture, found.drops_GG)),
    )
    write_text(path, page)


def overlay(picture: Image.Image, drops_GG: np.ndarray) -> Image.Image:
    """The image in gray under red, where covering lowers the cosine, and blue, where it raises it."""
    scaled = drops_GG / max(float(np.abs(drops_GG).max()), 1e-9)
    smooth = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)).clip(
        -1, 1
    )
    gray = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    colors = np.where(smooth[..., None] > 0, np.array(RED, np.float32), np.array(BLUE, np.float32))
    share = MOST_OPAQUE * np.abs(smooth)[..., None]
    return Image.fromarray((gray * (1 - share) + colors * share).round().astype(np.uint8))


def _covered(whole: Image.Image, row: int, column: int, grid: int, color: tuple[int, ...]) -> Image.Image:
    copy = whole.copy()
    width, height = whole.size
    left, top = column * width // grid, row * height // grid
    right, bottom = (column + WINDOW) * width // grid, (row + WINDOW) * height // grid
    copy.paste(color, (left, top, right, bottom))
    return copy


def _data_uri(picture: Image.Image) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, format="WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
