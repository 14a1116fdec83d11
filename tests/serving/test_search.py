"""Search in a vector store over HTTP."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from vlm2vec import Embedder
from vlm2vec.jobs.stores import facts_of
from vlm2vec.retrieval.open import open_store
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings


def test_a_store_is_searched_by_text_and_filter(embedder: Embedder, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "texts.lance"), facts_of(embedder, "compact"))
    texts = ["a dog on the beach", "a red car", "Zurich"]
    store.upsert(["a", "b", "c"], embedder.encode(texts), [{"place": place} for place in range(3)])
    with TestClient(create_app(embedder, ServeSettings(model="compact"), store)) as client:
        body = {"query": {"text": "a red car", "instruction": ""}, "k": 2}
        want = store.search(embedder.encode_query(["a red car"])[0], 2)
        answer = client.post("/v1/search", json=body).json()
        assert [hit["key"] for hit in answer["results"]] == [hit.key for hit in want]
        found = client.post("/v1/search", json={**body, "where": "place = 2"}).json()["results"]
        assert [hit["key"] for hit in found] == ["c"] and found[0]["metadata"]["place"] == 2
        assert client.post("/v1/search", json={**body, "where": "nonsense ("}).status_code == 400
    store.close()


def test_without_a_store_search_says_so(client: TestClient) -> None:
    answer = client.post("/v1/search", json={"query": "x"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_store"
