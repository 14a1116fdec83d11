"""The model behind an adapter: loaded on first use, called by one thread at a time, with lists of floats as results."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any

from vlm2vec.models.embedder import Embedder
from vlm2vec.types import require_many

Vectors = list[list[float]]


class AdapterModel:
    """A model as the adapters call it.

    Args:
        model: A loaded model; or a folder, hub id or built-in name, which is loaded on first use.
        truncate_dim: Keep the first dimensions only and normalize again; None: all.
        **options: Arguments of `Embedder.from_pretrained`, such as `device` or `dtype`.
    """

    def __init__(self, model: str | Embedder, truncate_dim: int | None = None, **options: Any) -> None:
        self._model, self._truncate_dim = model, truncate_dim
        self._options = {name: value for name, value in options.items() if value is not None}
        self._turn = threading.Lock()

    def dim(self) -> int:
        """Number of dimensions of a vector."""
        return self._truncate_dim or self._loaded().embedding_dim

    def queries(self, values: Sequence[Any]) -> Vectors:
        """Vectors of queries, with the model's instruction for queries.

        Args:
            values: Strings, PIL images, image paths (`pathlib.Path`) or dicts with `text` and `image`.

        Raises:
            UserError: for an input that is empty or unreadable, and for a single one in place of a list.
        """
        return self._vectors(values, "query")

    def documents(self, values: Sequence[Any]) -> Vectors:
        """Vectors of documents, with the model's instruction for documents; otherwise as `queries`."""
        return self._vectors(values, "document")

    def images(self, values: Sequence[Any]) -> Vectors:
        """Vectors of images as documents.

        Args:
            values: Paths, data URIs, bytes, open files or PIL images.

        Raises:
            UserError: for an unreadable image, or a URL, which is not fetched.
        """
        require_many(values, "images")
        return self.documents([as_image(value) for value in values])

    def _vectors(self, values: Sequence[Any], role: str) -> Vectors:
        require_many(values, "queries" if role == "query" else "documents")
        model = self._loaded()
        encode = model.encode_query if role == "query" else model.encode_document
        with self._turn:
            vectors_ND = encode(list(values), truncate_dim=self._truncate_dim)
        return [[float(value) for value in vector] for vector in vectors_ND]

    def _loaded(self) -> Embedder:
        with self._turn:
            if isinstance(self._model, str):
                self._model = Embedder.from_pretrained(self._model, **self._options)
            return self._model


def as_image(value: Any) -> dict[str, Any]:
    """An image as input of the model, which gets the model's instruction; a string is a path or a data URI."""
    return {"image": value.getvalue() if isinstance(value, io.BytesIO) else value}
