"""LanceDB: the embedding function `vlm2vec` of its registry, so that tables embed their rows and queries themselves.

Importing this module registers the function.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from lancedb.embeddings import EmbeddingFunction, register
from pydantic import PrivateAttr

from vlm2vec.integrations.model import AdapterModel, as_image


@register("vlm2vec")
class VLM2VecFunction(EmbeddingFunction):  # type: ignore[misc, unused-ignore]
    """Text and image embeddings of a LanceDB table.

    The table keeps these settings in its metadata and loads the model again when it is opened.

    Attributes:
        name: Folder, hub id or built-in name of the model.
        source: What a string of the source column is: a text, or the path of an image. Bytes are always an image.
        revision: Revision of a hub model; None: the default branch.
        device: Device of the model, such as "cuda:0"; None: a GPU if there is one.
        truncate_dim: Keep the first dimensions only and normalize again; None: all.
        max_retries: Retries of LanceDB; 0, because an unreadable input stays unreadable.
    """

    name: str = "compact"
    source: Literal["text", "image"] = "text"
    revision: str | None = None
    device: str | None = None
    truncate_dim: int | None = None
    max_retries: int = 0
    _model: AdapterModel | None = PrivateAttr(default=None)

    def ndims(self) -> int:
        """Number of dimensions of a vector."""
        return self._loaded().dim()

    def compute_query_embeddings(self, query: Any, *_: Any, **__: Any) -> list[np.ndarray]:
        """The vector of a query.

        Args:
            query: A text, a PIL image, an image path (`pathlib.Path`), or a dict with `text` and `image`.

        Raises:
            UserError: for an empty or unreadable query.
        """
        return [np.array(vector, np.float32) for vector in self._loaded().queries([query])]

    def compute_source_embeddings(self, values: Any, *_: Any, **__: Any) -> list[np.ndarray | None]:
        """Vectors of values of the source column; None for a missing value.

        Raises:
            UserError: for an unreadable value.
        """
        if isinstance(values, pa.Array | pa.ChunkedArray):
            values = values.to_pylist()
        values = [values] if isinstance(values, str | bytes) else list(values)
        present = [index for index, value in enumerate(values) if value is not None]
        vectors = self._loaded().documents([self._input(values[index]) for index in present])
        found: list[np.ndarray | None] = [None] * len(values)
        for index, vector in zip(present, vectors, strict=True):
            found[index] = np.array(vector, np.float32)
        return found

    def _input(self, value: Any) -> Any:
        return as_image(value) if self.source == "image" or isinstance(value, bytes) else str(value)

    def _loaded(self) -> AdapterModel:
        if self._model is None:
            self._model = AdapterModel(self.name, self.truncate_dim, revision=self.revision, device=self.device)
        return self._model
