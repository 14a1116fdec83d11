"""Every dialect returns the vectors of the library in the format that its clients read."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from wire import data_uri

from vlm2vec import Embedder
from vlm2vec.types import EmbeddingInput

TEXTS = ["a dog on the beach", "Zürich", "a dog on the beach", "one two three four five six seven"]


def vectors(client: TestClient, **body: Any) -> np.ndarray:
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert [item["index"] for item in content["data"]] == list(range(len(content["data"])))
    return np.array([item["embedding"] for item in content["data"]], dtype=np.float32)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert (ours * theirs).sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    assert np.linalg.norm(ours, axis=1) == pytest.approx(1.0, abs=1e-4)


def test_texts_get_the_vectors_of_the_library(client: TestClient, embedder: Embedder) -> None:
    assert_same(vectors(client, model="vlm2vec", input=TEXTS), embedder.encode(TEXTS))
    assert_same(vectors(client, input=TEXTS[0]), embedder.encode(TEXTS[:1]))


def test_base64_is_little_endian_float32(client: TestClient, embedder: Embedder) -> None:
    answer = client.post("/v1/embeddings", json={"input": TEXTS[:1], "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    assert_same(decoded[None], embedder.encode(TEXTS[:1]))


def test_dimensions_truncate_and_normalize(client: TestClient, embedder: Embedder) -> None:
    assert_same(vectors(client, input=TEXTS, dimensions=32), embedder.encode(TEXTS, truncate_dim=32))
    assert client.post("/v1/embeddings", json={"input": "x", "dimensions": 5000}).status_code == 400


def test_token_ids_are_decoded_to_their_text(client: TestClient, embedder: Embedder) -> None:
    ids = embedder.backbone.tokenizer(TEXTS)["input_ids"]
    assert_same(vectors(client, input=ids), embedder.encode(TEXTS))
    assert_same(vectors(client, input=ids[1]), embedder.encode(TEXTS[1:2]))
    assert client.post("/v1/embeddings", json={"input": [[10**8]]}).status_code == 400


def test_usage_counts_the_models_tokens(client: TestClient, embedder: Embedder) -> None:
    count = sum(embedder.backbone.process([EmbeddingInput(text=text)]).lengths()[0] for text in TEXTS)
    usage = client.post("/v1/embeddings", json={"input": TEXTS}).json()["usage"]
    assert usage == {"prompt_tokens": count, "total_tokens": count}


def test_an_instruction_is_that_of_the_library(client: TestClient, embedder: Embedder) -> None:
    want = embedder.encode(TEXTS, instruction="Represent the place")
    assert_same(vectors(client, input=TEXTS, instruction="Represent the place"), want)


def test_a_task_selects_the_models_own_instruction(client: TestClient, embedder: Embedder) -> None:
    assert_same(vectors(client, input=TEXTS, task="retrieval.query"), embedder.encode_query(TEXTS))
    assert_same(vectors(client, input=TEXTS, task="retrieval.passage"), embedder.encode_document(TEXTS))


def test_jinas_objects_with_both_keys_are_one_input(client: TestClient, embedder: Embedder, png: bytes) -> None:
    inputs = [{"text": "red"}, {"image": data_uri(png)}, {"text": "in red", "image": data_uri(png)}]
    bare = [{"image": base64.b64encode(png).decode()}]
    want = embedder.encode([{"text": "red"}, {"image": png}, {"text": "in red", "image": png}])
    assert_same(vectors(client, input=inputs), want)
    assert_same(vectors(client, input=bare), want[1:2])


def test_infinitys_modality_makes_strings_images(client: TestClient, embedder: Embedder, png: bytes) -> None:
    want = embedder.encode([{"image": png}])
    assert_same(vectors(client, input=[data_uri(png)], modality="image"), want)
    assert_same(vectors(client, input=data_uri(png)), want)  # a bare data URI, as gateways send it


def test_vllms_messages_are_one_input(client: TestClient, embedder: Embedder, png: bytes) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_uri(png)}}, {"type": "text", "text": "in red"}]
    messages = [{"role": "system", "content": "Find the same"}, {"role": "user", "content": content}]
    want = embedder.encode([{"text": "in red", "image": png, "instruction": "Find the same"}])
    assert_same(vectors(client, messages=messages), want)


def test_rerank_orders_by_cosine(client: TestClient, embedder: Embedder) -> None:
    body = {"query": TEXTS[0], "documents": TEXTS[1:], "top_n": 2, "return_documents": True}
    results = client.post("/v1/rerank", json=body).json()["results"]
    cosines = (embedder.encode_query(TEXTS[:1]) @ embedder.encode_document(TEXTS[1:]).T)[0]
    assert [result["index"] for result in results] == list(np.argsort(-cosines)[:2])
    assert [result["relevance_score"] for result in results] == pytest.approx(sorted(cosines)[::-1][:2], abs=1e-3)
    assert results[0]["document"] == {"text": TEXTS[1 + results[0]["index"]]}


def test_similarity_gives_all_pairs(client: TestClient, embedder: Embedder) -> None:
    answer = client.post("/v1/similarity", json={"queries": TEXTS[:2], "targets": TEXTS[1:]}).json()
    want = embedder.encode_query(TEXTS[:2]) @ embedder.encode_document(TEXTS[1:]).T
    assert np.array(answer["similarities"]) == pytest.approx(want, abs=1e-3)


def test_an_unknown_model_gets_404(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"input": "x", "model": "text-embedding-3"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models").json()["data"][0]["id"] == "vlm2vec"


def test_coheres_types_are_one_vector_in_several_forms(client: TestClient, embedder: Embedder, png: bytes) -> None:
    content = [{"type": "text", "text": "in red"}, {"type": "image_url", "image_url": {"url": data_uri(png)}}]
    body = {
        "model": "vlm2vec",
        "input_type": "search_query",
        "inputs": [{"content": content}],
        "embedding_types": ["float", "base64", "binary", "ubinary"],
    }
    made = client.post("/v2/embed", json=body).json()["embeddings"]
    vector = np.array(made["float"], dtype=np.float32)
    assert_same(vector, embedder.encode_query([{"text": "in red", "image": png}]))
    assert made["ubinary"] == np.packbits(vector > 0, axis=1).tolist()
    assert np.array(made["binary"]) + 128 == pytest.approx(np.array(made["ubinary"]))
