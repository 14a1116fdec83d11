"""A model and a store together: from a question to images.

A query is a text, an image, both ("this dress but in red"), or a row of the store ("more like this").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.vector_store import IMAGE, Hit, VectorStore
from vlm2vec.types import EmbeddingInput

# What a query is for, in the words of MMEB's four meta-tasks; offered by name.
PRESETS = {
    "retrieval": "Find an image that matches the given description.",
    "classification": "Represent the given image for classification.",
    "vqa": "Represent the given image with the following question.",
    "grounding": "Select the portion of the image that isolates the object of the given description.",
}


class QueryEncoder(Protocol):
    """What makes the vectors."""

    def encode_query(self, inputs: list[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        ...


@dataclass(frozen=True)
class Query:
    """What is looked for: at least one of text and image.

    Attributes:
        instruction: The query's task: one of `PRESETS` by name, or any sentence; None: the model's own.
    """

    text: str | None = None
    image: ImageRef | None = None
    instruction: str | None = None

    def as_input(self) -> EmbeddingInput:
        """The query as a model takes it.

        Raises:
            UserError: if there is neither text nor image.
        """
        text = (self.text or "").strip() or None
        if text is None and self.image is None:
            raise UserError("the query is empty: give a text, a picture or both")
        instruction = (self.instruction or "").strip() or None
        images = (self.image,) if self.image is not None else ()
        return EmbeddingInput(text, images, PRESETS.get(instruction or "", instruction))

    def __str__(self) -> str:
        parts = [repr(self.text) if self.text else "", str(self.image) if self.image else ""]
        return " + ".join(part for part in parts if part)


class Searcher:
    """Answers queries from one store by its own model."""

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
        """The k rows nearest to a row, without itself; no model is needed.

        Raises:
            UserError: if the row is not there.
        """
        rows = self.store.fetch([key], [], vectors=True)
        if rows.vectors_ND is None:
            raise UserError(f"{self.store.uri}: no row {key!r}")
        hits = self.store.search(rows.vectors_ND[0], k + 1, where)
        return [hit for hit in hits if hit.key != key][:k]


def image_ref(metadata: dict[str, Any]) -> ImageRef | None:
    """Where a row's image lies; None for a row without one."""
    if isinstance(metadata.get(IMAGE), bytes):
        return ImageRef(data=metadata[IMAGE])
    if metadata.get("modality") in ("text", "video") or not metadata.get("path"):
        return None
    return ImageRef(path=metadata["path"], member=metadata.get("member"))


def with_images(store: VectorStore, hits: list[Hit]) -> list[Hit]:
    """Hits with the copies of their images, where the store keeps such."""
    if IMAGE not in store.fields():
        return hits
    rows = store.fetch([hit.key for hit in hits], [IMAGE])
    kept = dict(zip(rows.keys, rows.metadata, strict=True))
    return [Hit(hit.key, hit.score, hit.metadata | kept.get(hit.key, {})) for hit in hits]
