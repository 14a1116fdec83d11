"""What the routes share: the model behind a request, from inputs to checked vectors and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response

from vlm2vec.serving.batching import Embedded, Engine, Outcome
from vlm2vec.serving.inputs import InputReader, Item
from vlm2vec.serving.refusals import Refusal, refuse_request
from vlm2vec.serving.settings import ServeSettings


@dataclass
class Serving:
    """The parts of a running server.

    Attributes:
        settings: As started.
        engine: Embeds.
        reader: Reads inputs of every dialect.
        store: For search, where one was given.
    """

    settings: ServeSettings
    engine: Engine
    reader: InputReader
    store: Any = None

    def check_model(self, name: str) -> str:
        """The name to answer with.

        Raises:
            Refusal: 404 for a model that is not here.
        """
        names = self.settings.served_names
        if name and name not in names:
            raise Refusal(404, "model_not_found", f"no model of that name here; there is {', '.join(names)}")
        return name or names[0]

    def check_dimensions(self, dimensions: int | None) -> int:
        """How many components of a vector to give.

        Raises:
            Refusal: 400 for more than there are.
        """
        most = self.engine.embedder.embedding_dim
        if dimensions is not None and dimensions > most:
            raise Refusal(400, "bad_dimensions", f"dimensions {dimensions}: expected 1 to {most}")
        return dimensions or most

    def check_count(self, values: Sequence[Any]) -> None:
        """Raises 413 for too many inputs."""
        if len(values) > self.settings.max_inputs:
            raise Refusal(
                413, "too_many_inputs", f"{len(values)} inputs; at most {self.settings.max_inputs} are accepted"
            )

    async def outcomes(self, items: Sequence[Item]) -> list[Outcome]:
        """A vector or a refusal for each input.

        Raises:
            Refusal: 408 at the deadline, 429 if the queue is full.
        """
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await self.engine.embed(items)
        except TimeoutError:
            raise Refusal(408, "timeout", f"not done in {self.settings.timeout:g} seconds", retry_after=1) from None

    async def vectors(self, items: Sequence[Item], dimensions: int | None = None) -> tuple[np.ndarray, int]:
        """Vectors of inputs that must all succeed, and the number of their tokens.

        Raises:
            Refusal: naming every refused input.
        """
        size = self.check_dimensions(dimensions)
        outcomes = await self.outcomes(items)
        if refused := {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)}:
            raise refuse_request(refused)
        made = [outcome for outcome in outcomes if isinstance(outcome, Embedded)]
        return truncated(np.stack([one.vector for one in made]), size), sum(one.num_tokens for one in made)


def truncated(vectors_ND: np.ndarray, size: int) -> np.ndarray:
    """The first components, of unit norm again."""
    if size == vectors_ND.shape[1]:
        return vectors_ND
    kept = vectors_ND[:, :size]
    norms = np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
    return np.asarray(kept / norms, dtype=np.float32)


def serving_of(request: Request) -> Serving:
    """The server that a request came to."""
    serving: Serving = request.app.state.serving
    return serving


def answer(content: dict[str, Any]) -> Response:
    """JSON, numpy arrays included."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def usage(num_tokens: int) -> dict[str, int]:
    """As OpenAI counts."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
