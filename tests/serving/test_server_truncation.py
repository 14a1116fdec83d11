"""Texts that are longer than the model reads are refused, or cut if the request asks for it, and then reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from tiny.dual import build_blip, build_clip, build_siglip
from wire import data_uri, post

from vlm2vec import Embedder
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings
from vlm2vec.serving.truncation import TextLimits, Truncation
from vlm2vec.types import EmbeddingInput

LIMIT = 510  # tokens of a text that the built-in model reads, besides its first and last
LONG = " ".join(f"word{number}" for number in range(400))


def vectors_of(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]])


def tokens(embedder: Embedder, text: str) -> list[int]:
    return list(embedder.backbone.tokenizer(text, add_special_tokens=False)["input_ids"])


def first(embedder: Embedder, text: str, count: int) -> str:
    """The text of the first tokens."""
    offsets = embedder.backbone.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[count - 1][1]]


def test_a_long_text_is_refused_with_both_counts_and_others_succeed(client: TestClient, embedder: Embedder) -> None:
    count = len(tokens(embedder, LONG))
    assert count > LIMIT
    answer = post(client, input=["fine", LONG], partial=True).json()
    assert [item["index"] for item in answer["data"]] == [0]
    (error,) = answer["errors"]
    assert error["index"] == 1 and error["code"] == "context_length_exceeded"
    assert f"maximum context length is {LIMIT} tokens" in error["message"] and f"has {count} tokens" in error["message"]
    alone = post(client, input=LONG)
    assert alone.status_code == 400 and "truncate_prompt_tokens" in alone.json()["error"]["message"]


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_limit_is_exact(client: TestClient, embedder: Embedder, beyond: int) -> None:
    text = first(embedder, LONG, LIMIT + beyond)
    assert len(tokens(embedder, text)) == LIMIT + beyond
    assert post(client, input=text).status_code == (400 if beyond > 0 else 200)


@pytest.mark.parametrize("asked", [{"truncate_prompt_tokens": -1}, {"truncate": True}])
def test_cut_to_the_models_limit_it_is_the_vector_of_the_library(
    client: TestClient, embedder: Embedder, asked: dict[str, Any]
) -> None:
    answer = post(client, input=["fine", LONG], **asked)
    assert (vectors_of(answer) * embedder.encode(["fine", LONG])).sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    (cut,) = answer.json()["truncated"]
    assert cut["index"] == 1 and cut["dropped"] == len(tokens(embedder, LONG)) - LIMIT
    assert (
        answer.json()["usage"]["prompt_tokens"]
        == cut["tokens"] + post(client, input="fine").json()["usage"]["prompt_tokens"]
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_cut_to_a_number_of_tokens_it_is_the_vector_of_the_shorter_text(
    client: TestClient, embedder: Embedder, side: str
) -> None:
    text = "a dog and a cat on the beach at noon in summer"
    answer = post(client, input=text, truncate_prompt_tokens=8, truncation_side=side)
    (cut,) = answer.json()["truncated"]
    assert answer.json()["usage"]["prompt_tokens"] == cut["tokens"] == 8
    kept = len(tokens(embedder, text)) - cut["dropped"]
    spans = embedder.backbone.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    shorter = text[: spans[kept - 1][1]] if side == "right" else text[spans[-kept][0] :]
    assert vectors_of(answer)[0] @ embedder.encode([shorter])[0] == pytest.approx(1.0, abs=1e-4)


def test_a_short_text_is_the_same_whatever_is_asked(client: TestClient) -> None:
    plain = post(client, input="a dog").json()
    for asked in ({"truncate_prompt_tokens": 100}, {"truncate_prompt_tokens": -1}, {"truncate": False}):
        assert post(client, input="a dog", **asked).json() == plain


def test_a_cut_result_is_not_given_to_a_request_that_does_not_ask_for_it(client: TestClient) -> None:
    text = LONG + " cached"
    assert post(client, input=text, truncate_prompt_tokens=-1).status_code == 200
    assert post(client, input=text).status_code == 400


def test_what_is_too_long_without_its_text_cannot_be_cut(client: TestClient, png: bytes) -> None:
    answer = post(client, input={"text": "a dog", "image": data_uri(png)}, truncate_prompt_tokens=2)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_truncation"
    assert post(client, input="a", truncate_prompt_tokens=0).status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        ("/v1/rerank", {"query": LONG, "documents": ["a"]}, {"truncate_prompt_tokens": -1}),
        ("/v1/similarity", {"queries": ["a"], "targets": [LONG]}, {"truncate": True}),
        ("/v2/embed", {"texts": [LONG]}, {"truncate": "END"}),
        ("/v2/embed", {"texts": [LONG]}, {"truncate": "START"}),
    ],
)
def test_every_path_refuses_unless_asked_to_cut(client: TestClient, path: str, body: Any, asked: Any) -> None:
    assert post(client, path, **body).status_code == 400
    answer = post(client, path, **body, **asked)
    assert answer.status_code == 200
    assert answer.json().get("truncated") or "cut" in answer.json()["meta"]["warnings"][0]


@pytest.mark.parametrize("build", [build_clip, build_siglip, build_blip])
def test_dual_encoders_count_what_they_read(tmp_path: Path, build: Callable[[Path], None]) -> None:
    build(tmp_path)
    model = Embedder.from_pretrained(tmp_path, device="cpu")
    limits = TextLimits(model.backbone, 32_768)
    text = "a dog " * 300
    made = limits.prepare(EmbeddingInput(text=text), Truncation(-1))
    assert made.dropped > 0
    assert limits.prepare(EmbeddingInput(text="a dog")).dropped == 0
    with TestClient(create_app(model, ServeSettings(model="tiny"))) as client:
        assert post(client, input=text).json()["error"]["code"] == "context_length_exceeded"
        cut = vectors_of(post(client, input=text, truncate_prompt_tokens=-1))
        assert cut[0] @ model.encode([text])[0] == pytest.approx(1.0, abs=1e-4)
