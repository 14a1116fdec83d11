"""The second stage of a search: a reranker reads the query with each of the nearest rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vlm2vec.errors import UserError
from vlm2vec.jobs.searching import Query, image_ref
from vlm2vec.retrieval.vector_store import Hit
from vlm2vec.types import EmbeddingInput

if TYPE_CHECKING:
    from vlm2vec.models.reranking.reranker import Reranker


def rerank_hits(
    ranker: Reranker, query: Query, hits: Sequence[Hit], k: int, cosine_weight: float = 0.0
) -> tuple[list[Hit], list[str]]:
    """The k best of some hits, in the order of a reranker.

    Args:
        ranker: Reads the query with each row.
        query: What was searched for.
        hits: Rows of the store with their metadata, nearest first.
        k: Number of rows returned.
        cosine_weight: The cosine of a row times this number is added to the reranker's log-odds. 0: the reranker alone
            decides.

    Returns:
        The rows, with the reranker's probability as their score, or with the sum if there is a weight; and why rows
        were left out that could not be read.
    """
    readable, skipped = [], []
    for hit in hits:
        try:
            readable.append((hit, _as_input(hit)))
        except UserError as error:
            skipped.append(str(error))
    failed: dict[int, UserError] = {}
    candidates = [item for _, item in readable]
    ranked = ranker.rank(
        query.as_input(),
        candidates,
        cosines=[hit.score for hit, _ in readable],
        cosine_weight=cosine_weight,
        on_error=failed.__setitem__,
    )
    skipped += [f"{readable[index][0].key}: {error}" for index, error in failed.items()]
    best = [found for found in ranked if found.index not in failed][:k]
    return [replace(readable[found.index][0], score=found.score) for found in best], skipped


def _as_input(hit: Hit) -> EmbeddingInput:
    image = image_ref(hit.metadata)
    if image is None:
        raise UserError(
            f"{hit.key}: the store keeps no image of this row, so it is not reranked; use vlm2vec rerank on its file"
        )
    return EmbeddingInput(images=(image,))
