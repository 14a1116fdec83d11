"""Scores of documents for a query: the cosine of two vectors, a reranker that reads both together, or their sum."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm2vec.models.reranking.scores import probability, with_cosine
from vlm2vec.serving.batching import Embedded, Outcome
from vlm2vec.serving.context import Serving, usage
from vlm2vec.serving.inputs import Item
from vlm2vec.serving.refusals import Refusal, refuse_request
from vlm2vec.serving.reranking import PairEngine
from vlm2vec.serving.schemas import RerankRequest
from vlm2vec.serving.truncation import Truncation
from vlm2vec.types import EmbeddingInput


@dataclass(frozen=True)
class Relevance:
    """The scores of a request's documents.

    Attributes:
        scored_by: What the scores are: "cosine", "reranker" or "reranker + cosine".
        scores: Score by position of each document that could be read, higher is more relevant.
        refused: The others by position.
        used: Token counts; positions in them count the query first.
    """

    scored_by: str
    scores: Mapping[int, float]
    refused: dict[int, Refusal]
    used: dict[str, Any]


@dataclass(frozen=True)
class _Scored:
    """What one model says of the documents.

    Attributes:
        values: Cosine or log-odds by position of the document.
        refused: Documents without a value, by position.
        made: Results by position, the query first.
    """

    values: dict[int, float]
    refused: dict[int, Refusal]
    made: dict[int, Embedded]


async def relevance(serving: Serving, body: RerankRequest) -> Relevance:
    """Score the documents of a request.

    Raises:
        Refusal: if the query or every document is refused, or the whole request is.
    """
    query = await serving.reader.one(body.query, body.instruction)
    documents = await serving.reader.all(body.documents, None)
    if isinstance(query, Refusal):
        raise refuse_request({0: query})
    weight = serving.settings.rerank_cosine
    if serving.pairs is None:
        found = await _cosines(serving, query, documents, body.truncation)
        scored_by, scores = "cosine", found.values
    elif not weight:
        found = await _log_odds(serving, serving.pairs, query, documents, body.truncation)
        scored_by = "reranker"
        scores = {index: float(probability(value)) for index, value in found.values.items()}
    else:
        near, found = await asyncio.gather(
            _cosines(serving, query, documents, body.truncation),
            _log_odds(serving, serving.pairs, query, documents, body.truncation),
        )
        scored_by = "reranker + cosine"
        scores = {
            index: float(with_cosine(value, near.values[index], weight))
            for index, value in found.values.items()
            if index in near.values
        }
        found = _together(found, near)
    if not scores:
        raise refuse_request(found.refused)
    return Relevance(scored_by, scores, found.refused, usage(found.made))


async def _cosines(
    serving: Serving, query: EmbeddingInput, documents: Sequence[Item], truncation: Truncation
) -> _Scored:
    """Cosines of the model's vectors, with its own instructions where the request has none."""
    reader = serving.reader
    items = [_instructed(query, reader.task_instruction("query"))]
    items += [_instructed(document, reader.task_instruction("document")) for document in documents]
    asked, *outcomes = await serving.outcomes(items, truncation)
    if isinstance(asked, Refusal):
        raise refuse_request({0: asked})
    return _scored(outcomes, {0: asked}, lambda vector_D: float(np.float32(vector_D @ asked.vector)))


async def _log_odds(
    serving: Serving, pairs: PairEngine, query: EmbeddingInput, documents: Sequence[Item], truncation: Truncation
) -> _Scored:
    """Log-odds of the reranker."""
    outcomes = await serving.outcomes(pairs.pairs(query, documents), pairs.truncation(truncation), pairs.engine)
    return _scored(outcomes, {}, lambda values: float(values[0]))


def _instructed(item: Item, instruction: str | None) -> Item:
    return item if isinstance(item, Refusal) else replace(item, instruction=item.instruction or instruction)


def _scored(outcomes: Sequence[Outcome], asked: dict[int, Embedded], value_of: Any) -> _Scored:
    made = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Embedded)}
    return _Scored(
        {index: value_of(one.vector) for index, one in made.items()},
        {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)},
        {**asked, **{1 + index: one for index, one in made.items()}},
    )


def _together(reranker: _Scored, embedder: _Scored) -> _Scored:
    """Refusals and token counts of both models; a document that one of them refuses is refused."""
    made = dict(embedder.made)
    for place, one in reranker.made.items():
        if place in made:
            num_tokens, dropped = one.num_tokens + made[place].num_tokens, one.dropped + made[place].dropped
            one = replace(one, num_tokens=num_tokens, dropped=dropped)
        made[place] = one
    refused = {**embedder.refused, **reranker.refused}
    return _Scored(reranker.values, dict(sorted(refused.items())), dict(sorted(made.items())))
