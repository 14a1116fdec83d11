"""Cohere's schema for `/v2/embed`: vectors by type; inputs as texts, images or mixed content."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from vlm2vec.serving.schema_base import Lenient, Text, VectorRequest
from vlm2vec.serving.schemas import DOT, Part
from vlm2vec.serving.truncation import MODEL_LIMIT, REFUSE, Truncation

ABOUT: dict[str, Any] = {
    "anyOf": [{"required": [name]} for name in ("texts", "images", "inputs")],
    "examples": [
        {"texts": ["a red car"], "input_type": "search_query", "embedding_types": ["float", "base64"]},
        {"inputs": [{"content": [{"type": "text", "text": "a red car"}]}], "embedding_types": ["binary", "ubinary"]},
        {"images": [DOT], "output_dimension": 64},
    ],
}
Vectors = list[list[float]]  # a name of its own, because the class below has a field `float`
EmbeddingType = Literal["float", "base64", "binary", "ubinary"]


class CohereInput(Lenient):
    """One input with text, images or both."""

    content: Annotated[list[Part], Field(min_length=1)]


class CohereRequest(VectorRequest):
    """A request with `inputs`, or with the older `texts` or `images`."""

    model_config = ConfigDict(json_schema_extra=ABOUT)

    model: str = ""
    input_type: str | None = Field(
        None, description="search_query or search_document: use the model's own instruction for it."
    )
    texts: Annotated[list[Text], Field(min_length=1)] | None = None
    images: Annotated[list[Text], Field(min_length=1)] | None = None
    inputs: Annotated[list[CohereInput], Field(min_length=1)] | None = None
    embedding_types: Annotated[tuple[EmbeddingType, ...], Field(min_length=1)] = ("float",)
    output_dimension: Annotated[StrictInt, Field(ge=1)] | None = None
    truncate: Literal["NONE", "START", "END"] = Field(
        "NONE", description="The side from which long texts are cut. Default: refuse them (400)."
    )

    @property
    def truncation(self) -> Truncation:
        """The truncation that the request asks for."""
        if self.truncate == "NONE":
            return REFUSE
        return Truncation(MODEL_LIMIT, "left" if self.truncate == "START" else "right")

    @model_validator(mode="after")
    def _one_of_three(self) -> CohereRequest:
        if sum(value is not None for value in (self.texts, self.images, self.inputs)) != 1:
            raise ValueError("give one of texts, images, inputs")
        return self


class CohereVectors(BaseModel):
    """Vectors of each requested type."""

    float: Vectors | None = None
    base64: list[str] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None


class CohereResponse(BaseModel):
    """The response format of Cohere's clients."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: CohereVectors
    texts: list[str] | None = None
    meta: dict[str, Any]


def by_type(vectors_ND: np.ndarray, kinds: Sequence[EmbeddingType]) -> dict[str, Any]:
    """Convert vectors [N, D] to each of the types.

    `ubinary` packs the signs of the components into bytes, first component in the highest bit; `binary` holds the same
    bytes minus 128.
    """
    packed = np.packbits(vectors_ND > 0, axis=1)
    every = {
        "float": lambda: list(vectors_ND),
        "base64": lambda: [as_base64(vector) for vector in vectors_ND],
        "ubinary": packed.tolist,
        "binary": (packed.astype(np.int16) - 128).tolist,
    }
    return {kind: every[kind]() for kind in dict.fromkeys(kinds)}


def as_base64(vector: np.ndarray) -> str:
    """Base64 of little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
