"""The ASGI application: the routes of one model, with errors in one format on every path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from vlm2vec import __version__
from vlm2vec.serving import routes, status
from vlm2vec.serving.context import Serving
from vlm2vec.serving.engine import Engine
from vlm2vec.serving.gate import Gate
from vlm2vec.serving.inputs import InputReader
from vlm2vec.serving.metrics import Metrics
from vlm2vec.serving.refusals import Refusal
from vlm2vec.serving.reranking import PairEngine, about_scores
from vlm2vec.serving.settings import ServeSettings
from vlm2vec.serving.validation import invalid_request

if TYPE_CHECKING:
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.models.reranking.reranker import Reranker

CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    embedder: Embedder, settings: ServeSettings, store: Any = None, reranker: Reranker | None = None
) -> FastAPI:
    """Create the application that serves one model.

    Args:
        embedder: The loaded model.
        settings: Limits and permissions.
        store: Vector store for `/v1/search`, made with the same model; None: `/v1/search` answers 404.
        reranker: Scores the documents of `/v1/rerank`; None: cosines do.

    Raises:
        UserError: if the key file cannot be used.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        engine = Engine(embedder, settings, metrics)
        pairs = PairEngine(reranker, settings, metrics) if reranker is not None else None
        reader = InputReader(settings, embedder.backbone.tokenizer, embedder.prompts)
        app.state.serving = Serving(settings, engine, reader, store, pairs)
        engines = [engine] if pairs is None else [engine, pairs.engine]
        for one in engines:
            one.start()
        yield
        for one in engines:
            one.close()

    app = FastAPI(
        title="vlm2vec",
        version=__version__,
        summary="Embeddings and search for text and images.",
        description=about_scores(settings),
        lifespan=running,
        redirect_slashes=False,
    )
    app.state.metrics = metrics
    app.include_router(routes.router)
    app.include_router(status.router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    if settings.cors_origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends headers of its own
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body(), error.status, error.headers())


async def _invalid(request: Request, error: Exception) -> Response:
    """Name the fields that are wrong without repeating their values."""
    assert isinstance(error, RequestValidationError)
    return await _refused(request, invalid_request(error.errors(), error.body, request.headers.get("content-type", "")))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    unreadable = error.status_code == 400  # of a body that is not text
    message = "the body is not valid JSON" if unreadable else str(error.detail)
    body: dict[str, Any] = Refusal(error.status_code, code, message).body()
    return JSONResponse(body, error.status_code, error.headers)
