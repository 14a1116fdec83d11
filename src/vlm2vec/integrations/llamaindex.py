"""LlamaIndex: `VLM2VecEmbedding`, a multimodal embedding for its indexes and retrievers."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import ImageType
from pydantic import PrivateAttr

from vlm2vec.integrations.model import AdapterModel, Vectors
from vlm2vec.models.embedder import Embedder


class VLM2VecEmbedding(MultiModalEmbedding):
    """Text and image embeddings for LlamaIndex.

    Args:
        model: A loaded `Embedder`; or a folder, hub id or built-in name, which is loaded on first use.
        truncate_dim: Keep the first dimensions only and normalize again; None: all.
        options: Arguments of `Embedder.from_pretrained`, such as `device` or `dtype`.
        **fields: Fields of LlamaIndex's base class, such as `embed_batch_size`.
    """

    _model: AdapterModel = PrivateAttr()

    def __init__(
        self,
        model: str | Embedder = "compact",
        truncate_dim: int | None = None,
        options: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(model_name=model if isinstance(model, str) else model.base, **fields)
        self._model = AdapterModel(model, truncate_dim, **(options or {}))

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in LlamaIndex's events."""
        return "VLM2VecEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.queries([query])[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> Vectors:
        return self._model.documents(texts)

    def _get_image_embedding(self, img_file_path: ImageType) -> list[float]:
        return self._model.images([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> Vectors:
        return self._model.images(img_file_paths)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> Vectors:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_image_embedding(self, img_file_path: ImageType) -> list[float]:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> Vectors:
        return await asyncio.to_thread(self._get_image_embeddings, img_file_paths)
