"""Routes that embed and compare: `/v1/embeddings`, `/v2/embed`, `/v1/rerank`, `/v1/similarity`, `/v1/search`."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from vlm2vec.errors import UserError
from vlm2vec.serving.batching import Embedded
from vlm2vec.serving.cohere import CohereRequest, CohereResponse, as_base64, by_type
from vlm2vec.serving.context import Serving, answer, serving_of, shortened, usage
from vlm2vec.serving.inputs import Item
from vlm2vec.serving.refusals import Refusal, refuse_request
from vlm2vec.serving.relevance import relevance
from vlm2vec.serving.schemas import (
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorResponse,
    InputObject,
    RerankRequest,
    RerankResponse,
    SearchRequest,
    SearchResponse,
    SimilarityRequest,
    SimilarityResponse,
)
from vlm2vec.serving.strict_json import StrictRoute

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": about}
    for status, about in {
        400: "The request or one of its inputs is invalid.",
        401: "The API key is missing or not valid.",
        403: "An image is in a place that this server does not read.",
        404: "The model or path does not exist.",
        408: "The request exceeded the timeout.",
        413: "The request or one of its inputs is too large.",
        415: "The Content-Type header is not that of JSON.",
        422: "The model fails on an input.",
        429: "The queue is full or the rate limit is exceeded; see Retry-After.",
        500: "Internal server error.",
        503: "The model is not working at the moment.",
    }.items()
}
router = APIRouter(responses=REFUSALS, route_class=StrictRoute)


@router.post("/v1/embeddings", responses={200: {"model": EmbeddingResponse}}, tags=["embed"])
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Embed text and images, in the dialects of OpenAI, vLLM, Jina and Infinity."""
    serving = serving_of(request)
    name = serving.check_model(body.model)
    items = await _items(body, serving)
    size = serving.check_dimensions(body.dimensions)
    outcomes = await serving.outcomes(items, body.truncation)
    refused = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)}
    if refused and not body.partial:
        raise refuse_request(refused)
    made = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Embedded)}
    vectors_ND = shortened(np.stack([one.vector for one in made.values()]), size) if made else ()
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": as_base64(vector) if body.encoding_format == "base64" else vector,
        }
        for index, vector in zip(made, vectors_ND, strict=True)
    ]
    used = usage(made)
    errors = {"errors": [refusal.detail(index) for index, refusal in refused.items()]} if body.partial else {}
    _log(request, len(items), used)
    return answer({"object": "list", "data": data, "model": name, **used, **errors})


async def _items(body: EmbeddingRequest, serving: Serving) -> list[Item]:
    task = body.task or body.input_type or body.prompt_name
    instruction = body.instruction or serving.reader.task_instruction(task)
    if body.messages is not None:
        return [await serving.reader.messages(body.messages, instruction)]
    one = isinstance(body.input, str | InputObject) or (isinstance(body.input, list) and isinstance(body.input[0], int))
    values: Any = [body.input] if one else body.input
    serving.check_count(values)
    return await serving.reader.all(values, instruction, body.modality == "image")


@router.post("/v2/embed", responses={200: {"model": CohereResponse}}, tags=["embed"])
async def cohere_embed(body: CohereRequest, request: Request) -> Response:
    """Embed texts, images or mixed content in Cohere's dialect, with several vector types at once."""
    serving = serving_of(request)
    serving.check_model(body.model)
    instruction = serving.reader.task_instruction(body.input_type)
    size = serving.check_dimensions(body.output_dimension)
    if size % 8 and {"binary", "ubinary"} & set(body.embedding_types):
        raise Refusal(400, "bad_dimensions", f"binary vectors need a multiple of 8 dimensions, not {size}")
    values: Any = body.texts or body.images or body.inputs
    serving.check_count(values)
    if body.inputs:
        items = [await serving.reader.parts(one.content, instruction) for one in body.inputs]
    else:
        items = await serving.reader.all(values, instruction, body.images is not None)
    vectors_ND, made = await serving.vectors(items, body.truncation, size)
    used = usage(dict(enumerate(made)))
    _log(request, len(items), used)
    images = sum(len(item.images) for item in items if not isinstance(item, Refusal))
    billed = {"input_tokens": used["usage"]["prompt_tokens"], "images": images}
    warnings = [f"input {one['index']}: {one['dropped']} tokens were cut" for one in used.get("truncated", ())]
    return answer(
        {
            "id": str(uuid.uuid4()),
            "response_type": "embeddings_by_type",
            "embeddings": by_type(vectors_ND, body.embedding_types),
            "texts": body.texts or [],
            "meta": {"api_version": {"version": "2"}, "billed_units": billed}
            | ({"warnings": warnings} if warnings else {}),
        }
    )


@router.post("/v1/rerank", responses={200: {"model": RerankResponse}}, tags=["compare"])
@router.post("/v2/rerank", responses={200: {"model": RerankResponse}}, tags=["compare"])
async def rerank(body: RerankRequest, request: Request) -> Response:
    """Rank documents by their relevance to a query, best first, for the clients of Cohere and Jina.

    The score is the cosine, or that of the server's reranker, or the sum of both, as the server was started; the answer
    says which.
    """
    serving = serving_of(request)
    reranker = serving.pairs.name if serving.pairs else None
    name = serving.check_model(body.model or reranker or "", (reranker,) if reranker else ())
    serving.check_count(body.documents)
    found = await relevance(serving, body)
    _log(request, 1 + len(body.documents), found.used)
    order = sorted(found.scores, key=lambda place: -found.scores[place])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": place, "relevance_score": found.scores[place]} for place in order]
    if body.return_documents:
        for result in results:
            document = body.documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else _plain(document)
    errors = {"errors": [refusal.detail(index) for index, refusal in found.refused.items()]} if found.refused else {}
    facts = {"id": str(uuid.uuid4()), "model": name, "scored_by": found.scored_by}
    return answer({**facts, "results": results, **found.used, **errors})


@router.post("/v1/similarity", responses={200: {"model": SimilarityResponse}}, tags=["compare"])
async def similarity(body: SimilarityRequest, request: Request) -> Response:
    """Compute the cosines of all pairs of queries and targets."""
    serving = serving_of(request)
    name = serving.check_model(body.model)
    serving.check_count([*body.queries, *body.targets])
    queries_MD, targets_ND, used = await _two_sides(serving, body.queries, body.targets, body)
    _log(request, len(body.queries) + len(body.targets), used)
    return answer({"model": name, "similarities": list(queries_MD @ targets_ND.T), **used})


@router.post("/v1/search", responses={200: {"model": SearchResponse}}, tags=["search"])
async def search(body: SearchRequest, request: Request) -> Response:
    """Find the rows of the vector store that are nearest to a query."""
    serving = serving_of(request)
    name = serving.check_model(body.model)
    if serving.store is None:
        raise Refusal(404, "no_store", "this server has no vector store; start it with --store STORE")
    instruction = body.instruction or serving.reader.task_instruction("query")
    vectors_1D, made = await serving.vectors([await serving.reader.one(body.query, instruction)], body.truncation)
    try:
        hits = await asyncio.to_thread(serving.store.search, vectors_1D[0], body.k, body.where)
    except UserError as error:  # the filter is wrong
        raise Refusal(400, "bad_filter", str(error)) from None
    results = [
        {
            "key": hit.key,
            "score": float(hit.score),
            "metadata": {name: value for name, value in hit.metadata.items() if not isinstance(value, bytes)},
        }
        for hit in hits
    ]
    return answer({"model": name, "results": results, **usage(dict(enumerate(made)))})


async def _two_sides(
    serving: Serving, queries: list[Any], targets: list[Any], body: SimilarityRequest
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the vectors of queries and targets, each with the model's own instruction, and the token counts.

    Positions in the counts are those of the queries followed by the targets.
    """
    reader = serving.reader
    items = await reader.all(queries, body.instruction or reader.task_instruction("query"))
    items += await reader.all(targets, reader.task_instruction("document"))
    vectors_ND, made = await serving.vectors(items, body.truncation)
    return vectors_ND[: len(queries)], vectors_ND[len(queries) :], usage(dict(enumerate(made)))


def _log(request: Request, num_inputs: int, used: dict[str, Any]) -> None:
    request.state.facts = {"inputs": num_inputs, "tokens": used["usage"]["prompt_tokens"]}


def _plain(document: Any) -> Any:
    return document.model_dump(exclude_none=True) if isinstance(document, InputObject) else document
