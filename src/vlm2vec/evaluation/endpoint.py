"""Evaluate a model behind an HTTP endpoint with OpenAI's embeddings schema, such as `vlm2vec serve` or vLLM.

Requests are batched, sent concurrently and retried. Vectors are cached like those of any model. The cache identifies
an endpoint by its address, the name of the model and the vectors of a few probe texts, so that another model behind
the same address does not reuse them.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np

from vlm2vec.errors import UserError, did_you_mean
from vlm2vec.evaluation.evaluate import FillCache, filling
from vlm2vec.media.images import ImageRef
from vlm2vec.models.prompts import PLACEHOLDER
from vlm2vec.types import EmbeddingInput

Dialect = Literal["objects", "messages", "strings"]
KEY_VARIABLE = "VLM2VEC_API_KEY"
PROBES = ("a dog on the beach", "the balance sheet of 2023", "E = mc²")
RETRIED = (408, 425, 429, 500, 502, 503, 504)
MAX_WAIT = 60.0  # seconds between two attempts
MAX_BATCH_BYTES = 16 << 20  # half of the limit of `vlm2vec serve` on a request


@dataclass(frozen=True)
class Endpoint:
    """Address and settings of an endpoint.

    Attributes:
        url: Base URL, such as `http://127.0.0.1:8000/v1`.
        model: Name of the model in requests.
        dialect: How inputs are written. `objects`: `{"text", "image", "instruction"}`, as Jina and `vlm2vec serve`;
            `messages`: one chat per request, as vLLM; `strings`: text alone. None: chosen by the `owned_by` of
            `/models` (`vlm2vec`: objects, `vllm`: messages, any other: strings).
        batch_size: Inputs per request; a chat is always a request of its own.
        concurrency: Requests at a time.
        timeout: Seconds for a response.
        attempts: Attempts per request, counting the first.
    """

    url: str
    model: str
    dialect: Dialect | None = None
    batch_size: int = 32
    concurrency: int = 8
    timeout: float = 300.0
    attempts: int = 6

    @classmethod
    def of(cls, url: str, model: str | None, options: dict[str, Any]) -> Self:
        """Check the settings of the command line.

        Raises:
            UserError: if the model's name is missing, or a setting is unknown or out of range.
        """
        if not model:
            raise UserError(
                f"{url}: the name of the model is missing; add --model NAME, one of {url.rstrip('/')}/models"
            )
        known = {field.name for field in fields(cls)} - {"url", "model"}
        for name, value in options.items():
            if name not in known:
                raise UserError(f"--option {name}: unknown setting of an endpoint{did_you_mean(name, known)}")
            number = name != "dialect"
            if number and not (isinstance(value, int | float) and value > 0):
                raise UserError(f"--option {name}={value}: expected a positive number")
            if not number and value not in get_args(Dialect):
                raise UserError(f"--option dialect={value}: expected one of {', '.join(get_args(Dialect))}")
        return cls(url.rstrip("/"), model, **options)


class EndpointEngine:
    """The engine of an evaluation behind an endpoint; see `vlm2vec.evaluation.run.Engine`.

    Args:
        endpoint: Address and settings. An API key is read from the environment variable `VLM2VEC_API_KEY`.

    Raises:
        UserError: if the endpoint does not answer, or does not have the model.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.num_encoded = 0
        self.dialect = endpoint.dialect or self._dialect()
        probes = self.encode([EmbeddingInput(text=text) for text in PROBES])
        self.about = {
            "model": endpoint.model,
            "endpoint": endpoint.url,
            "dialect": self.dialect,
            "dimensions": str(probes.shape[1]),
            # The position of the largest component is stable under rounding, and differs between models.
            "probes": ",".join(map(str, np.abs(probes).argmax(axis=1))),
        }
        self.size = {"embedding_dimension": int(probes.shape[1])}
        self.num_encoded = 0  # the probes do not count

    @property
    def fill(self) -> FillCache:
        """Encode what an embedding cache lacks, part after part."""
        return filling(self)

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        """Return the unit-norm vectors [N, D] of inputs, in order.

        Raises:
            UserError: if the endpoint refuses an input, or a request fails on every attempt.
        """
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            bodies = list(self._bodies(inputs, pool))
            parts = list(pool.map(self._embed, bodies))
        vectors_ND = np.concatenate(parts)
        self.num_encoded += len(inputs)
        return np.asarray(vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12))

    def _bodies(self, inputs: Sequence[EmbeddingInput], pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
        """Requests for inputs, in order."""
        common: dict[str, Any] = {"model": self.endpoint.model, "encoding_format": "base64"}
        if self.dialect != "strings":  # an OpenAI server refuses fields that it does not know
            common["truncate_prompt_tokens"] = -1  # long texts are cut, as the library does
        if self.dialect == "messages":
            yield from ({**common, "messages": messages} for messages in pool.map(chat_of, inputs))
            return
        batch: list[Any] = []
        size = 0
        for value in pool.map(object_of if self.dialect == "objects" else string_of, inputs):
            length = len(json.dumps(value))
            if batch and (len(batch) >= self.endpoint.batch_size or size + length > MAX_BATCH_BYTES):
                yield {**common, "input": batch}
                batch, size = [], 0
            batch.append(value)
            size += length
        if batch:
            yield {**common, "input": batch}

    def _embed(self, body: dict[str, Any]) -> np.ndarray:
        """The vectors [n, D] of one request."""
        url, count = f"{self.endpoint.url}/embeddings", len(body.get("input", [None]))
        answer = self._ask(url, body)
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.stack([_vector(row["embedding"]) for row in rows])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{url}: unexpected response ({type(error).__name__}); expected data[].embedding"
            ) from error
        if len(vectors) != count or not np.isfinite(vectors).all():
            raise UserError(f"{url}: expected {count} finite vectors, got {len(vectors)} or NaN or Inf among them")
        return vectors

    def _dialect(self) -> Dialect:
        """The dialect of the server, by its list of models."""
        url = f"{self.endpoint.url}/models"
        cards = {card.get("id"): card for card in self._ask(url).get("data", [])}
        if self.endpoint.model not in cards:
            known = ", ".join(map(str, cards)) or "none"
            raise UserError(f"{url}: no model {self.endpoint.model}; expected one of: {known}")
        owner = cards[self.endpoint.model].get("owned_by")
        return {"vlm2vec": "objects", "vllm": "messages"}.get(owner, "strings")  # type: ignore[return-value]

    def _ask(self, url: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON response to a request, which is repeated while the server is busy or unreachable.

        Raises:
            UserError: if the request is refused, or fails on every attempt.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        reason, wait = "", 0.0
        for attempt in range(self.endpoint.attempts):
            time.sleep(wait)
            wait = min(MAX_WAIT, 0.5 * 2**attempt)
            request = urllib.request.Request(url, data, headers)  # noqa: S310 - the user names the address
            try:
                with urllib.request.urlopen(request, timeout=self.endpoint.timeout) as answer:  # noqa: S310
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"{error.code} {_message(error.read(10_000))}"
                if error.code not in RETRIED:
                    raise UserError(f"{url}: request refused: {reason}") from error
                wait = _seconds(error.headers.get("Retry-After"), wait)
            except (OSError, json.JSONDecodeError) as error:
                reason = str(error)
        raise UserError(f"{url}: {self.endpoint.attempts} attempts failed; last error: {reason}")


def object_of(item: EmbeddingInput) -> dict[str, Any]:
    """An input as `vlm2vec serve` and Jina read it."""
    _no_video(item)
    images = [data_uri(image) for image in item.images]
    parts = {"text": item.text, "images": images or None, "instruction": item.instruction}
    return {name: value for name, value in parts.items() if value is not None}


def string_of(item: EmbeddingInput) -> str:
    """An input as plain text; an instruction comes first, as the default template writes it."""
    _no_video(item)
    if item.images:
        raise UserError("the endpoint takes text alone; for images choose --option dialect=objects or dialect=messages")
    return " ".join(part for part in (item.instruction, item.text) if part)


def chat_of(item: EmbeddingInput) -> list[dict[str, Any]]:
    """An input as a chat: the instruction is the system turn, and images are where the text has their placeholders."""
    _no_video(item)
    urls = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in item.images]
    pieces = PLACEHOLDER.split(item.text or "")  # text, number, text, number, … text
    if len(pieces) == 1:
        content = [*urls, *_text_part(item.text)]
    else:
        content = _text_part(pieces[0])
        for number, text in zip(pieces[1::2], pieces[2::2], strict=True):
            content += [urls[int(number) - 1], *_text_part(text.removeprefix("\n"))]
    system = [{"role": "system", "content": item.instruction}] if item.instruction else []
    return [*system, {"role": "user", "content": content}]


def data_uri(image: ImageRef) -> str:
    """An image as it is prepared here, without loss."""
    encoded = io.BytesIO()
    image.load().save(encoded, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _text_part(text: str | None) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _no_video(item: EmbeddingInput) -> None:
    if item.video is not None:
        raise UserError("an endpoint cannot be evaluated on videos; choose tasks of texts and images with --task")


def _vector(value: Any) -> np.ndarray:
    """A vector as base64 of little-endian float32, or as numbers from servers that know no base64."""
    decoded = np.frombuffer(base64.b64decode(value), dtype="<f4") if isinstance(value, str) else value
    return np.asarray(decoded, dtype=np.float32)


def _message(body: bytes) -> str:
    """The message of an error response, cut to a readable length."""
    try:
        content = json.loads(body)
        error = content.get("error", content)
        text = error.get("message", "") if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:200]


def _seconds(header: str | None, default: float) -> float:
    return min(MAX_WAIT, float(header)) if header and header.isdigit() else default
