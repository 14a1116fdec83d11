"""Shared by the routes: request checks, the call to the engine, and responses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response

from vlm2vec.serving.batching import Embedded, Outcome
from vlm2vec.serving.engine import Engine
from vlm2vec.serving.inputs import InputReader, Item
from vlm2vec.serving.refusals import Refusal, refuse_request
from vlm2vec.serving.reranking import PairEngine
from vlm2vec.serving.settings import ServeSettings
from vlm2vec.serving.truncation import REFUSE, Truncation


@dataclass
class Serving:
    """The parts of a running server.

    Attributes:
        settings: Settings of the server.
        engine: Embeds inputs.
        reader: Reads the inputs of every dialect.
        store: Vector store for search, if there is one.
        pairs: Scores query and document together, if there is a reranker.
    """

    settings: ServeSettings
    engine: Engine
    reader: InputReader
    store: Any = None
    pairs: PairEngine | None = None

    def check_model(self, name: str, more: tuple[str, ...] = ()) -> str:
        """Return the model name for the response.

        Args:
            name: The name in the request; empty: the default.
            more: Names that this path accepts besides those of the embedder.

        Raises:
            Refusal: 404 if the server has no model of this name.
        """
        names = (*self.settings.served_names, *more)
        if name and name not in names:
            raise self.unknown_model(names)
        return name or names[0]

    def unknown_model(self, names: tuple[str, ...] = ()) -> Refusal:
        """The refusal of a model name that the server does not have."""
        known = ", ".join(names or self.settings.served_names)
        return Refusal(404, "model_not_found", f"no model of this name; expected one of: {known}", param="model")

    def check_dimensions(self, dimensions: int | None) -> int:
        """Return the number of vector components for the response.

        Raises:
            Refusal: 400 if the model has fewer.
        """
        most = self.engine.embedder.embedding_dim
        if dimensions is not None and dimensions > most:
            raise Refusal(400, "bad_dimensions", f"dimensions {dimensions}: expected 1 to {most}")
        return dimensions or most

    def check_count(self, values: Sequence[Any]) -> None:
        """Raise 413 if a request has too many inputs."""
        if len(values) > self.settings.max_inputs:
            raise Refusal(
                413, "too_many_inputs", f"{len(values)} inputs; at most {self.settings.max_inputs} are accepted"
            )

    async def outcomes(
        self, items: Sequence[Item], truncation: Truncation = REFUSE, engine: Engine | None = None
    ) -> list[Outcome]:
        """Return a vector or a refusal for each input.

        Args:
            items: Inputs, and refusals of inputs that could not be read.
            truncation: What happens to long inputs.
            engine: Computes the vectors; None: that of the embedder.

        Raises:
            Refusal: 408 at the deadline, 429 if the queue is full.
        """
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await (engine or self.engine).embed(items, truncation)
        except TimeoutError:
            raise Refusal(
                408, "timeout", f"not finished within {self.settings.timeout:g} seconds", retry_after=1
            ) from None

    async def vectors(
        self, items: Sequence[Item], truncation: Truncation = REFUSE, dimensions: int | None = None
    ) -> tuple[np.ndarray, list[Embedded]]:
        """Return the vectors [N, D] and the results of inputs that must all succeed.

        Raises:
            Refusal: if any input is refused; it lists all of them.
        """
        size = self.check_dimensions(dimensions)
        outcomes = await self.outcomes(items, truncation)
        if refused := {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)}:
            raise refuse_request(refused)
        made = [outcome for outcome in outcomes if isinstance(outcome, Embedded)]
        return shortened(np.stack([one.vector for one in made]), size), made


def shortened(vectors_ND: np.ndarray, size: int) -> np.ndarray:
    """Keep the first `size` components and normalize again."""
    if size == vectors_ND.shape[1]:
        return vectors_ND
    kept = vectors_ND[:, :size]
    norms = np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
    return np.asarray(kept / norms, dtype=np.float32)


def serving_of(request: Request) -> Serving:
    """The serving state of the application."""
    serving: Serving = request.app.state.serving
    return serving


def answer(content: dict[str, Any]) -> Response:
    """A JSON response; values may be numpy arrays."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def usage(made: Mapping[int, Embedded]) -> dict[str, Any]:
    """Token counts in OpenAI's format, and the inputs that were cut if there are any; `made` by position."""
    num_tokens = sum(one.num_tokens for one in made.values())
    cut = [{"index": i, "tokens": one.num_tokens, "dropped": one.dropped} for i, one in made.items() if one.dropped]
    counts = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"usage": counts, "truncated": cut} if cut else {"usage": counts}
