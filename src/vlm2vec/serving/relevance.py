"""Scores of documents for a query: by the cosine of two vectors, or by a reranker that reads both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm2vec.serving.batching import Embedded, Outcome
from vlm2vec.serving.context import Serving, usage
from vlm2vec.serving.inputs import Item
from vlm2vec.serving.refusals import Refusal, refuse_request
from vlm2vec.serving.reranking import PairEngine, probability
from vlm2vec.serving.schemas import RerankRequest


@dataclass(frozen=True)
class Relevance:
    """The scores of a request's documents.

    Attributes:
        scores: Score by position of each document that could be read, higher is more relevant.
        refused: The others by position.
        used: Token counts; positions in them count the query first.
    """

    scores: Mapping[int, float]
    refused: dict[int, Refusal]
    used: dict[str, Any]


async def relevance(serving: Serving, body: RerankRequest) -> Relevance:
    """Score the documents of a request.

    Raises:
        Refusal: if the query or every document is refused, or the whole request is.
    """
    pairs, reader = serving.pairs, serving.reader
    own = None if pairs else reader.task_instruction("query")
    query = await reader.one(body.query, body.instruction or own)
    documents = await reader.all(body.documents, None if pairs else reader.task_instruction("document"))
    if isinstance(query, Refusal):
        raise refuse_request({0: query})
    if pairs is None:
        found = await _by_cosine(serving, query, documents, body)
    else:
        found = await _by_reranker(serving, pairs, query, documents, body)
    if not found.scores:
        raise refuse_request(found.refused)
    return found


async def _by_cosine(serving: Serving, query: Item, documents: Sequence[Item], body: RerankRequest) -> Relevance:
    asked, *outcomes = await serving.outcomes([query, *documents], body.truncation)
    if isinstance(asked, Refusal):
        raise refuse_request({0: asked})
    scores = {
        index: float(np.float32(outcome.vector @ asked.vector))
        for index, outcome in enumerate(outcomes)
        if isinstance(outcome, Embedded)
    }
    return _relevance(scores, outcomes, {0: asked})


async def _by_reranker(
    serving: Serving, pairs: PairEngine, query: Item, documents: Sequence[Item], body: RerankRequest
) -> Relevance:
    assert not isinstance(query, Refusal)
    items = pairs.pairs(query, documents)
    outcomes = await serving.outcomes(items, pairs.truncation(body.truncation), pairs.engine)
    scores = {index: probability(one) for index, one in enumerate(outcomes) if isinstance(one, Embedded)}
    return _relevance(scores, outcomes, {})


def _relevance(scores: Mapping[int, float], outcomes: Sequence[Outcome], asked: Mapping[int, Embedded]) -> Relevance:
    refused = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)}
    made = {1 + index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Embedded)}
    return Relevance(scores, refused, usage({**asked, **made}))
