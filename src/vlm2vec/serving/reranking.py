"""The reranker of a server: it reads query and document together, batched as the embedder's inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm2vec.errors import UserError
from vlm2vec.serving.engine import Engine, Observer
from vlm2vec.serving.inputs import Item
from vlm2vec.serving.refusals import Refusal
from vlm2vec.serving.truncation import REFUSE, Truncation
from vlm2vec.types import EmbeddingInput

if TYPE_CHECKING:
    from vlm2vec.models.reranking.reranker import Reranker
    from vlm2vec.serving.settings import ServeSettings


def about_scores(settings: ServeSettings) -> str:
    """How the documents of `/v1/rerank` are scored, for the OpenAPI page."""
    if settings.reranker is None:
        return "This server has no reranker: `/v1/rerank` orders documents by their cosine to the query."
    name = Path(settings.reranker).name
    if not settings.rerank_cosine:
        return f"`/v1/rerank` orders documents by the reranker {name}, which reads query and document together."
    return (
        f"`/v1/rerank` orders documents by the log-odds of the reranker {name}, which reads query and document "
        f"together, plus {settings.rerank_cosine:g} times their cosine to the query."
    )


class PairEngine:
    """Scores pairs of query and document in batches that requests share.

    Queue, limits, cache and refusals are those of `Engine`: a pair is one input.

    Args:
        reranker: The model.
        settings: Budgets and limits.
        observer: Receives batches and refusals, for metrics.
    """

    def __init__(self, reranker: Reranker, settings: ServeSettings, observer: Observer) -> None:
        self._reranker = reranker
        self.engine = Engine(reranker.scorer, settings, observer)
        self.name = Path(settings.reranker or "reranker").name

    def pairs(self, query: EmbeddingInput, documents: Sequence[Item]) -> list[Item]:
        """Combine the query with each document; a document that was refused stays so."""
        return [document if isinstance(document, Refusal) else self._pair(query, document) for document in documents]

    def truncation(self, asked: Truncation) -> Truncation:
        """The truncation of pairs: from the end, which is the end of the document.

        Raises:
            Refusal: 400 if the end of the prompt is not the end of the document.
        """
        if asked != REFUSE and not self._reranker.has_chat:
            message = "this reranker has no chat template, so pairs cannot be cut; send shorter texts"
            raise Refusal(400, "bad_truncation", message, param="truncate_prompt_tokens")
        return replace(asked, side="right")

    def _pair(self, query: EmbeddingInput, document: EmbeddingInput) -> Item:
        try:
            return self._reranker.pair(query, document)
        except UserError as error:
            return Refusal(400, "bad_input", str(error))
