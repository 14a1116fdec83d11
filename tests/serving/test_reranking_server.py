"""`/v1/rerank` with a reranker: the scores of `Reranker`, one bad document alone; without one, cosines that say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from tiny.models import draw_image
from wire import data_uri, encoded

from vlm2vec import Embedder
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker
from vlm2vec.serving.app import create_app
from vlm2vec.serving.run import load_reranker
from vlm2vec.serving.settings import ServeSettings

PROMPT = RerankPrompt(system="Judge.", answers=("y", "n"))
RED = encoded(draw_image(40, 30, seed=3))
SETTINGS = ServeSettings(model="compact", reranker="org/tiny-reranker")
DOCUMENTS = ["a dog", {"image": data_uri(RED)}, {"text": "a red car", "image": data_uri(RED)}]


@pytest.fixture(scope="module")
def reranker(tiny_vlm: Callable[[str], Path]) -> Reranker:
    folder = tiny_vlm("qwen2_vl")
    return Reranker.from_pretrained(str(folder), prompt=PROMPT, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def server(embedder: Embedder, reranker: Reranker) -> Iterator[TestClient]:
    with TestClient(create_app(embedder, SETTINGS, reranker=reranker)) as client:
        yield client


def test_scores_are_those_of_the_reranker(server: TestClient, reranker: Reranker, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    image = tmp_path / "red.png"
    body = {"query": "red", "documents": DOCUMENTS, "instruction": "Find it.", "return_documents": True}
    answer = server.post("/v1/rerank", json=body).json()
    expected = reranker.rank("red", ["a dog", image, {"image": image, "text": "a red car"}], instruction="Find it.")
    assert [one["index"] for one in answer["results"]] == [one.index for one in expected]
    assert [one["relevance_score"] for one in answer["results"]] == pytest.approx([o.score for o in expected], abs=1e-4)
    assert (answer["scored_by"], answer["model"]) == ("reranker", "tiny-reranker")
    assert answer["results"][0]["document"] is not None and answer["usage"]["prompt_tokens"] > 0
    assert len(server.post("/v2/rerank", json={**body, "top_n": 1}).json()["results"]) == 1


@pytest.mark.parametrize("weight", [3.0, 1e5])
def test_with_a_weight_each_score_is_log_odds_plus_cosine(
    weight: float, embedder: Embedder, reranker: Reranker, client: TestClient, server: TestClient
) -> None:
    """The cosines are those of the server without a reranker, the log-odds those of the server without a weight."""
    body = {"query": "red", "documents": DOCUMENTS}
    near, alone = (scores(one.post("/v1/rerank", json=body).json()) for one in (client, server))
    settings = SETTINGS.model_copy(update={"rerank_cosine": weight})
    with TestClient(create_app(embedder, settings, reranker=reranker)) as both:
        answer = both.post("/v1/rerank", json=body).json()
        found = scores(answer)
        expected = {i: math.log(alone[i] / (1 - alone[i])) + weight * near[i] for i in range(3)}
        assert found == pytest.approx(expected, abs=2e-4 + 1e-6 * weight)
        assert list(found) == sorted(found, key=lambda i: -found[i])
        assert answer["scored_by"] == "reranker + cosine"
        counts = [one.post("/v1/rerank", json=body).json()["usage"]["prompt_tokens"] for one in (client, server)]
        assert answer["usage"]["prompt_tokens"] == sum(counts)
        about = both.get("/openapi.json").json()["info"]["description"]
        assert f"plus {weight:g} times their cosine" in about
    if weight == 1e5:
        assert list(found) == list(near)


def test_with_a_weight_a_document_that_one_model_refuses_fails_alone(embedder: Embedder, reranker: Reranker) -> None:
    """A text of 600 tokens is too long for the embedder; the reranker reads it, if it has no such limit."""
    settings = SETTINGS.model_copy(update={"rerank_cosine": 20.0})
    with TestClient(create_app(embedder, settings, reranker=reranker)) as both:
        body = {"query": "red", "documents": ["a cat", {"image": data_uri(b"no image")}, "word " * 600, "a dog"]}
        answer = both.post("/v1/rerank", json=body).json()
        assert sorted(one["index"] for one in answer["results"]) == [0, 3]
        assert [error["index"] for error in answer["errors"]] == [1, 2]
        long = both.post("/v1/rerank", json={"query": "word " * 600, "documents": ["a dog"]})
        assert long.status_code == 400


def scores(answer: dict[str, Any]) -> dict[int, float]:
    """Scores by position, best first."""
    return {one["index"]: one["relevance_score"] for one in answer["results"]}


def test_a_bad_document_fails_alone_and_a_bad_query_fails_the_request(server: TestClient) -> None:
    bad = {"image": data_uri(b"no image")}
    answer = server.post("/v1/rerank", json={"query": "red", "documents": ["a dog", bad, "a cat"]})
    assert answer.status_code == 200
    assert sorted(one["index"] for one in answer.json()["results"]) == [0, 2]
    [error] = answer.json()["errors"]
    assert error["index"] == 1 and error["code"] == "bad_image"
    refused = server.post("/v1/rerank", json={"query": bad, "documents": ["a dog"]})
    assert refused.status_code == 400
    nothing = server.post("/v1/rerank", json={"query": "red", "documents": [bad]})
    assert nothing.status_code == 400


def test_limits_and_names_are_those_of_the_server(embedder: Embedder, reranker: Reranker) -> None:
    settings = ServeSettings(model="compact", reranker="org/tiny-reranker", max_inputs=2, max_chars=500)
    with TestClient(create_app(embedder, settings, reranker=reranker)) as client:
        many = client.post("/v1/rerank", json={"query": "red", "documents": ["a", "b", "c"]})
        assert (many.status_code, many.json()["error"]["code"]) == (413, "too_many_inputs")
        long = client.post("/v1/rerank", json={"query": "red", "documents": ["a " * 300, "b"]}).json()
        assert [one["index"] for one in long["results"]] == [1] and long["errors"][0]["index"] == 0
        for name in ("tiny-reranker", "vlm2vec", ""):
            body = {"model": name, "query": "red", "documents": ["a"]}
            assert client.post("/v1/rerank", json=body).status_code == 200
        unknown = client.post("/v1/rerank", json={"model": "other", "query": "red", "documents": ["a"]})
        assert unknown.status_code == 404 and "tiny-reranker" in unknown.json()["error"]["message"]
        cut = client.post("/v1/rerank", json={"query": "red", "documents": ["a"], "truncate_prompt_tokens": -1})
        assert (cut.status_code, cut.json()["error"]["code"]) == (400, "bad_truncation")
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200


def test_without_a_reranker_the_answer_and_the_openapi_page_say_cosine(client: TestClient, server: TestClient) -> None:
    answer = client.post("/v1/rerank", json={"query": "red", "documents": ["a dog", "a cat"]}).json()
    assert (answer["scored_by"], answer["model"]) == ("cosine", "vlm2vec")
    assert "by their cosine" in client.get("/openapi.json").json()["info"]["description"]
    assert "the reranker tiny-reranker" in server.get("/openapi.json").json()["info"]["description"]


def test_a_bad_document_fails_alone_with_cosines_too(client: TestClient) -> None:
    body = {"query": "red", "documents": [{"image": data_uri(b"no image")}, "a cat"]}
    answer = client.post("/v1/rerank", json=body).json()
    assert [one["index"] for one in answer["results"]] == [1] and answer["errors"][0]["index"] == 0


def test_the_reranker_is_loaded_in_the_precision_of_the_server(
    tiny_vlm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Reranker.from_pretrained
    monkeypatch.setattr(Reranker, "from_pretrained", lambda source, **options: load(source, prompt=PROMPT, **options))
    settings = ServeSettings(model="compact", reranker=str(tiny_vlm("qwen2_vl")), dtype="bfloat16")
    loaded = load_reranker(settings, torch.device("cpu"))
    assert loaded is not None and next(loaded.backbone.parameters()).dtype == torch.bfloat16
    assert load_reranker(ServeSettings(model="compact"), torch.device("cpu")) is None
