"""Searches a vector store with its model.

A query is a text, an image, both ("this dress but in red"), or a row of the store ("more like this").
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec.errors import UserError, shown
from vlm2vec.media.images import ImageRef
from vlm2vec.media.text import actual_path
from vlm2vec.retrieval.metadata import PREFIX, THUMBNAIL
from vlm2vec.retrieval.vector_store import Hit, VectorStore
from vlm2vec.types import EmbeddingInput

# Instructions of MMEB's four meta-tasks, which a query may give by name.
PRESETS = {
    "retrieval": "Find an image that matches the given description.",
    "classification": "Represent the given image for classification.",
    "vqa": "Represent the given image with the following question.",
    "grounding": "Select the portion of the image that isolates the object of the given description.",
}


class QueryEncoder(Protocol):
    """Computes the vectors."""

    def encode_query(self, inputs: list[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        ...


@dataclass(frozen=True)
class Query:
    """A query: at least one of text and image.

    Attributes:
        instruction: The query's task: a name of `PRESETS`, or any sentence; None: the model's default.
    """

    text: str | None = None
    image: ImageRef | None = None
    instruction: str | None = None

    def as_input(self) -> EmbeddingInput:
        """The query as input of the model.

        Raises:
            UserError: if there is neither text nor image.
        """
        text = (self.text or "").strip() or None
        if text is None and self.image is None:
            raise UserError("the query is empty: give a text, an image or both")
        instruction = (self.instruction or "").strip() or None
        images = (self.image,) if self.image is not None else ()
        return EmbeddingInput(text, images, PRESETS.get(instruction or "", instruction))

    def __str__(self) -> str:
        parts = [repr(self.text) if self.text else "", str(self.image) if self.image else ""]
        return " + ".join(part for part in parts if part)


class Searcher:
    """Answers queries from one store with the model that made it."""

    def __init__(self, encoder: QueryEncoder, store: VectorStore) -> None:
        self.encoder = encoder
        self.store = store

    def search(self, query: Query, k: int = 10, where: str | None = None) -> list[Hit]:
        """The k rows nearest to a query, best first.

        Raises:
            UserError: for an empty query, an unreadable image, or a filter that the store cannot read.
        """
        vector_D = self.encoder.encode_query([query.as_input()])[0]
        return self.store.search(vector_D, k, where)

    def similar(self, key: str, k: int = 10, where: str | None = None) -> list[Hit]:
        """The k rows nearest to a row, without the row itself; no model is needed.

        Raises:
            UserError: if the store has no such row.
        """
        rows = self.store.fetch([key], [], vectors=True)
        if rows.vectors_ND is None:
            raise UserError(f"{self.store.uri}: no row {shown(key)}")
        hits = self.store.search(rows.vectors_ND[0], k + 1, where)
        return [hit for hit in hits if hit.key != key][:k]


def image_ref(metadata: dict[str, Any]) -> ImageRef | None:
    """Returns the image of a row: its thumbnail if stored, otherwise its file; None if the row has no image."""
    if isinstance(metadata.get(THUMBNAIL), bytes):
        return ImageRef(data=metadata[THUMBNAIL])
    path = metadata.get(f"{PREFIX}path")
    if metadata.get(f"{PREFIX}modality") in ("text", "video") or not path:
        return None
    member = metadata.get(f"{PREFIX}member")
    return ImageRef(path=actual_path(path), member=actual_path(member) if member else None)


def is_missing(metadata: dict[str, Any]) -> bool:
    """Whether the file that a row was made from no longer exists; False for a row that names none."""
    path = str(metadata.get(f"{PREFIX}path") or "")
    return bool(path) and not Path(actual_path(path)).exists()


def with_images(store: VectorStore, hits: list[Hit]) -> list[Hit]:
    """Hits with their thumbnails, where the store keeps them."""
    if THUMBNAIL not in store.fields():
        return hits
    rows = store.fetch([hit.key for hit in hits], [THUMBNAIL])
    kept = dict(zip(rows.keys, rows.metadata, strict=True))
    return [Hit(hit.key, hit.score, hit.metadata | kept.get(hit.key, {})) for hit in hits]
