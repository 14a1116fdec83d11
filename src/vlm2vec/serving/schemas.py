"""Schemas of requests and responses under `/v1`: embeddings with the image dialects, ranking, search, health."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from vlm2vec.serving.schema_base import Lenient, Strict, Text, TokenId, Truncatable


class Url(Lenient):
    """The place of an image: a data URI, an allowed URL, or a path below the media root."""

    url: Text


class TextPart(Lenient):
    """The text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrlPart(Lenient):
    """An image of a message, in the format of OpenAI's chat and vLLM."""

    type: Literal["image_url"]
    image_url: Url | Text


class ImagePart(Lenient):
    """An image of a message, in the short format."""

    type: Literal["image"]
    image: Url | Text


Part = Annotated[TextPart | ImageUrlPart | ImagePart, Field(discriminator="type")]


class Message(Lenient):
    """One turn of a chat. System turns are the instruction; empty assistant turns are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] = ""

    @model_validator(mode="after")
    def _no_answer(self) -> Message:
        parts = self.content if isinstance(self.content, list) else []
        said = self.content if isinstance(self.content, str) else "".join(getattr(part, "text", "x") for part in parts)
        if self.role == "assistant" and said:
            raise ValueError("the content of an assistant turn must be empty; the vector is that of the other turns")
        return self


class InputObject(Strict):
    """One input with text, images or both, in Jina's format."""

    text: Text | None = None
    image: Url | Text | None = None
    images: list[Url | Text] | None = None
    instruction: Text | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> InputObject:
        if self.image is not None and self.images:
            raise ValueError("give either image or images")
        return self


Input = Text | list[TokenId] | InputObject
# A PNG of one red pixel, for examples.
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


class EmbeddingRequest(Truncatable):
    """`input` (text, token ids, objects) gives one vector per entry; `messages` give one vector for the whole chat."""

    model_config = ConfigDict(json_schema_extra=ABOUT)

    model: str = Field("", description="A name of /v1/models; empty or null: the model of this server.")
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
    instruction: Text | None = Field(None, description="Task instruction of inputs without their own.")
    modality: Literal["text", "image"] = Field("text", description="`image`: strings are images (as in Infinity).")
    task: str | None = Field(
        None, description="A name that contains `query` or `document`: use the model's own instruction for it."
    )
    input_type: str | None = Field(None, description="The same as `task` (as in NVIDIA NIM).")
    prompt_name: str | None = Field(None, description="The same as `task` (as in Text Embeddings Inference).")
    partial: StrictBool = Field(False, description="Embed the valid inputs and list the refused ones in `errors`.")
    user: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> EmbeddingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        return self


class Usage(BaseModel):
    """Tokens that the model reads, image tokens included."""

    prompt_tokens: int
    total_tokens: int


class TruncatedInput(BaseModel):
    """An input whose text was cut, as the request asked: tokens that were read, and text tokens that were dropped."""

    index: int
    tokens: int
    dropped: int


class EmbeddingItem(BaseModel):
    """One vector: a list of numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class InputError(BaseModel):
    """A refused input."""

    index: int
    code: str
    message: str


class EmbeddingResponse(BaseModel):
    """OpenAI's list of vectors, with `errors` if the request has `partial`."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: Usage
    truncated: list[TruncatedInput] | None = None
    errors: list[InputError] | None = None


class RerankRequest(Truncatable):
    """Rank documents by their relevance to a query."""

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
    instruction: Text | None = Field(
        None,
        description="Instruction of the query, or definition of relevance for a reranker; default: the model's own.",
    )


class RerankResult(BaseModel):
    """The position of a document in the request, and its score."""

    index: int
    relevance_score: float
    document: Any = None


class RerankResponse(BaseModel):
    """The results, best first, without the documents that could not be read, which are listed under `errors`."""

    id: str
    model: str
    scored_by: Literal["cosine", "reranker", "reranker + cosine"] = Field(
        description="cosine: of the vectors of query and document. "
        "reranker: probability that the document answers the query, by a model that reads both together. "
        "reranker + cosine: its log-odds plus the weighted cosine, any number."
    )
    results: list[RerankResult]
    usage: Usage
    truncated: list[TruncatedInput] | None = None
    errors: list[InputError] | None = None


class SimilarityRequest(Truncatable):
    """Compute the cosines of all pairs of queries and targets."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"queries": ["a red car"], "targets": ["a dog", {"image": DOT}]}]}
    )

    model: str = ""
    queries: Annotated[list[Input], Field(min_length=1)]
    targets: Annotated[list[Input], Field(min_length=1)]
    instruction: Text | None = Field(
        None, description="Instruction of the queries; default: the model's own for queries."
    )


class SimilarityResponse(BaseModel):
    """One row of cosines per query."""

    model: str
    similarities: list[list[float]]
    usage: Usage
    truncated: list[TruncatedInput] | None = None


class SearchRequest(Truncatable):
    """Find the nearest rows of the vector store."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "a red car", "k": 3}]})

    model: str = ""
    query: Input
    k: Annotated[StrictInt, Field(ge=1, le=1000)] = 10
    where: Text | None = Field(None, description="Filter on the rows, such as `width > 600`.")
    instruction: Text | None = Field(
        None, description="Instruction of the query; default: the model's own for queries."
    )


class SearchResult(BaseModel):
    """A row of the store with its cosine and metadata."""

    key: str
    score: float
    metadata: dict[str, Any]


class SearchResponse(BaseModel):
    """The results, best first."""

    model: str
    results: list[SearchResult]
    usage: Usage
    truncated: list[TruncatedInput] | None = None


class ModelCard(BaseModel):
    """A model name that requests may use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    embedding_dim: int


class ModelList(BaseModel):
    """The model names of this server."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "unavailable"]


class ErrorContent(BaseModel):
    """The reason why a request was refused."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    details: list[InputError] | None = None


class ErrorResponse(BaseModel):
    """The error format of every path."""

    error: ErrorContent
