"""Requests and answers of `/v1`: OpenAI's embeddings with the image dialects, ranking, search, health."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, WrapValidator, model_validator


def _any_string(value: Any, usual: Callable[[Any], str]) -> str:
    """A string as it came: lone surrogates are refused by input, not by request."""
    return value if isinstance(value, str) else usual(value)


Text = Annotated[str, WrapValidator(_any_string)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]


class Lenient(BaseModel):
    """A request: fields that this server does not know are left alone, as clients send many."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Strict(BaseModel):
    """A part of an input: an unknown field is a mistake that would change the vector."""

    model_config = ConfigDict(extra="forbid")


class Url(Lenient):
    """Where an image is: a data URI, an allowed URL, or a path below the media root."""

    url: Text


class TextPart(Lenient):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrlPart(Lenient):
    """An image of a message, as OpenAI's chat and vLLM write it."""

    type: Literal["image_url"]
    image_url: Url | Text


class ImagePart(Lenient):
    """An image of a message, the short way."""

    type: Literal["image"]
    image: Url | Text


Part = Annotated[TextPart | ImageUrlPart | ImagePart, Field(discriminator="type")]


class Message(Lenient):
    """One turn. System turns are the instruction."""

    role: Literal["system", "developer", "user"]
    content: Text | list[Part]


class InputObject(Strict):
    """One input of text, images or both together, as Jina writes it."""

    text: Text | None = None
    image: Url | Text | None = None
    images: list[Url | Text] | None = None
    instruction: Text | None = None


Input = Text | list[TokenId] | InputObject
# An image of one red pixel, for examples.
DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
CHAT = [{"type": "text", "text": "the same in blue"}, {"type": "image_url", "image_url": {"url": DOT}}]
ABOUT: dict[str, Any] = {
    "anyOf": [{"required": ["input"]}, {"required": ["messages"]}],
    "examples": [
        {"input": ["a red car", {"text": "the same in blue", "image": DOT}]},
        {"input": "a red car", "task": "query", "dimensions": 64, "encoding_format": "base64"},
        {"input": [DOT], "modality": "image"},
        {"input": ["a red car", ""], "partial": True},
        {"messages": [{"role": "user", "content": CHAT}]},
    ],
}


class EmbeddingRequest(Lenient):
    """`input` (text, token ids, objects) gives a vector each; `messages` give one vector of the whole chat."""

    model_config = ConfigDict(json_schema_extra=ABOUT)

    model: str = Field("", description="One of /v1/models; empty: the only one.")
    input: (
        Text
        | InputObject
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Input], Field(min_length=1)]
        | None
    ) = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    instruction: Text | None = Field(None, description="What the vectors are for; of inputs that have none.")
    modality: Literal["text", "image"] = Field("text", description="`image`: strings are pictures (as Infinity).")
    task: str | None = Field(None, description="`query` or `document` in it: the model's own instruction for that.")
    partial: StrictBool = Field(False, description="Refused inputs are listed in `errors`; the others succeed.")
    user: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> EmbeddingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        return self


class Usage(BaseModel):
    """Tokens as the model counts them, visual ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(BaseModel):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class InputError(BaseModel):
    """A refused input."""

    index: int
    code: str
    message: str


class EmbeddingResponse(BaseModel):
    """OpenAI's list; `errors` only where `partial` was asked for."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: Usage
    errors: list[InputError] | None = None


class RerankRequest(Lenient):
    """Documents in the order of their similarity to a query."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"query": "a red car", "documents": ["a dog", {"image": DOT}], "return_documents": True}]
        }
    )

    model: str = ""
    query: Input
    documents: Annotated[list[Input], Field(min_length=1)]
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: StrictBool = False
    instruction: Text | None = Field(None, description="Of the query; default: the model's own for queries.")


class RerankResult(BaseModel):
    """A document's place in the request and its cosine."""

    index: int
    relevance_score: float
    document: Any = None


class RerankResponse(BaseModel):
    """Best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage


class SimilarityRequest(Lenient):
    """Cosines of all pairs."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"queries": ["a red car"], "targets": ["a dog", {"image": DOT}]}]}
    )

    model: str = ""
    queries: Annotated[list[Input], Field(min_length=1)]
    targets: Annotated[list[Input], Field(min_length=1)]
    instruction: Text | None = Field(None, description="Of the queries; default: the model's own for queries.")


class SimilarityResponse(BaseModel):
    """A row for each query."""

    model: str
    similarities: list[list[float]]
    usage: Usage


class SearchRequest(Lenient):
    """The nearest rows of the store."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "a red car", "k": 3}]})

    model: str = ""
    query: Input
    k: Annotated[StrictInt, Field(ge=1, le=1000)] = 10
    where: Text | None = Field(None, description="A filter of the rows, such as `width > 600`.")
    instruction: Text | None = Field(None, description="Of the query; default: the model's own for queries.")


class SearchResult(BaseModel):
    """A row, its cosine and its metadata."""

    key: str
    score: float
    metadata: dict[str, Any]


class SearchResponse(BaseModel):
    """Best first."""

    model: str
    results: list[SearchResult]
    usage: Usage


class ModelCard(BaseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    embedding_dim: int


class ModelList(BaseModel):
    """The models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """What was asked for, in one word."""

    status: Literal["ok", "unavailable"]


class ErrorContent(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    details: list[InputError] | None = None


class ErrorResponse(BaseModel):
    """Errors of every path have this shape."""

    error: ErrorContent
