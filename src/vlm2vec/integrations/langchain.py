"""LangChain: `VLM2VecEmbeddings` for texts, with `embed_image` as the multimodal classes of its community have it."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings

from vlm2vec.integrations.model import AdapterModel, Vectors
from vlm2vec.models.embedder import Embedder


class VLM2VecEmbeddings(Embeddings):
    """Text and image embeddings for LangChain.

    Args:
        model: A loaded `Embedder`; or a folder, hub id or built-in name, which is loaded on first use.
        truncate_dim: Keep the first dimensions only and normalize again; None: all.
        **options: Arguments of `Embedder.from_pretrained`, such as `device` or `dtype`.
    """

    def __init__(self, model: str | Embedder = "compact", truncate_dim: int | None = None, **options: Any):
        self._model = AdapterModel(model, truncate_dim, **options)

    def embed_documents(self, texts: list[str]) -> Vectors:
        """Unit-norm vectors of texts, with the model's instruction for documents."""
        return self._model.documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """Unit-norm vector of a text, with the model's instruction for queries."""
        return self._model.queries([text])[0]

    def embed_image(self, uris: list[str]) -> Vectors:
        """Unit-norm vectors of images, with the model's instruction for documents.

        Args:
            uris: Paths or data URIs.

        Raises:
            UserError: for an unreadable image, or a URL, which is not fetched.
        """
        return self._model.images(uris)
