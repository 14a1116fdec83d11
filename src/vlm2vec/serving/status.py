"""Routes for operators: models, health, metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from vlm2vec.serving.context import Serving, answer, serving_of
from vlm2vec.serving.routes import REFUSALS
from vlm2vec.serving.schemas import Health, ModelCard, ModelList

router = APIRouter()
GUARDED: dict[int | str, dict[str, Any]] = {status: REFUSALS[status] for status in (401, 413, 429)}
STARTED = int(time.time())


@router.get("/v1/models", responses={200: {"model": ModelList}, **GUARDED}, tags=["status"])
async def models(request: Request) -> Response:
    """List the names that requests may give the model."""
    serving = serving_of(request)
    return answer({"object": "list", "data": [_card(serving, name) for name in serving.settings.served_names]})


@router.get(
    "/v1/models/{name:path}", responses={200: {"model": ModelCard}, 404: REFUSALS[404], **GUARDED}, tags=["status"]
)
async def model(name: str, request: Request) -> Response:
    """Describe the model by one of its names."""
    serving = serving_of(request)
    if name not in serving.settings.served_names:
        raise serving.unknown_model()
    return answer(_card(serving, name))


def _card(serving: Serving, name: str) -> dict[str, Any]:
    dim = serving.engine.embedder.embedding_dim
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "vlm2vec", "embedding_dim": dim}


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", responses={200: {"model": Health}, 413: REFUSALS[413]}, tags=["status"])
async def live() -> Response:
    """Liveness: the process answers. Restart it if it does not."""
    return answer({"status": "ok"})


@router.head("/health/ready", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.get(
    "/health/ready", responses={200: {"model": Health}, 503: {"model": Health}, 413: REFUSALS[413]}, tags=["status"]
)
@router.get("/health", responses={200: {"model": Health}, 503: {"model": Health}, 413: REFUSALS[413]}, tags=["status"])
async def ready(request: Request) -> Response:
    """Readiness: a forward pass succeeded in the last seconds or succeeds now. Otherwise send no traffic."""
    serving = serving_of(request)
    well = await serving.engine.ready() and (serving.pairs is None or await serving.pairs.engine.ready())
    response = answer({"status": "ok" if well else "unavailable"})
    response.status_code = 200 if well else 503
    return response


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}, **GUARDED},
    tags=["status"],
)
async def metrics(request: Request) -> Response:
    """Metrics of requests, batches, caches and refusals, for Prometheus."""
    return PlainTextResponse(request.app.state.metrics.text())
