"""Haystack: `VLM2VecTextEmbedder` for queries, `VLM2VecDocumentEmbedder` for documents with text, an image or both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haystack import Document, component
from haystack.dataclasses import ByteStream

from vlm2vec.integrations.model import AdapterModel, Vectors, as_image
from vlm2vec.models.embedder import Embedder


class _Settings:
    """Settings of both components. Haystack reads them by the names of the arguments when it saves a pipeline."""

    def __init__(
        self,
        model: str | Embedder = "compact",
        truncate_dim: int | None = None,
        device: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.model, self.truncate_dim, self.device, self.revision = model, truncate_dim, device, revision
        self._loaded = AdapterModel(model, truncate_dim, device=device, revision=revision)


@component
class VLM2VecTextEmbedder(_Settings):
    """Embeds a query, with the model's instruction for queries.

    Args:
        model: Folder, hub id or built-in name, loaded on first use; or a loaded `Embedder`, which YAML cannot
            hold.
        truncate_dim: Keep the first dimensions only and normalize again; None: all.
        device: Device of the model, such as "cuda:0"; None: a GPU if there is one.
        revision: Revision of a hub model; None: the default branch.
    """

    @component.output_types(embedding=list[float])
    def run(self, text: str | None = None, image: str | ByteStream | None = None) -> dict[str, list[float]]:
        """Returns the unit-norm vector of a text, an image, or both together.

        Args:
            text: The query's text.
            image: A path, a data URI, or the bytes of an image file.

        Raises:
            UserError: for an empty query or an unreadable image.
        """
        return {"embedding": self._loaded.queries([_input(text, image)])[0]}


@component
class VLM2VecDocumentEmbedder(_Settings):
    """Embeds documents, with the model's instruction for documents; arguments as in `VLM2VecTextEmbedder`.

    The image of a document is its `blob`, or the file named in its metadata as `file_path` if it has no text.
    """

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Returns copies of the documents with their unit-norm vectors.

        Raises:
            UserError: for a document without text and image, or an unreadable image.
        """
        vectors: Vectors = self._loaded.documents([_input(each.content, _image_of(each)) for each in documents])
        found = [replace(each, embedding=vector) for each, vector in zip(documents, vectors, strict=True)]
        return {"documents": found}


def _image_of(document: Document) -> str | ByteStream | None:
    if document.blob is not None or document.content:
        return document.blob
    path: str | None = document.meta.get("file_path")
    return path


def _input(text: str | None, image: str | ByteStream | None) -> dict[str, Any]:
    found: dict[str, Any] = {"text": text} if text else {}
    return found if image is None else found | as_image(image.data if isinstance(image, ByteStream) else image)
