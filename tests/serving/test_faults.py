"""One bad input fails alone; limits, keys and places of pictures are kept to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient
from wire import data_uri, encoded

from vlm2vec.serving.fetch import Fetcher, is_public
from vlm2vec.serving.refusals import Refusal

BAD: dict[str, Any] = {
    "truncated": lambda png: {"image": data_uri(png[: len(png) // 2])},
    "svg": lambda png: {"image": data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")},
    "100 megapixels": lambda png: {"image": data_uri(encoded(Image.new("1", (10_000, 10_000))))},
    "a million characters": lambda png: "x" * 1_000_000,
    "empty": lambda png: {},
    "file scheme": lambda png: {"image": "file:///etc/passwd"},
    "a path": lambda png: {"image": "../etc/passwd"},
    "a url": lambda png: {"image": "http://127.0.0.1/a.png"},
    "no base64": lambda png: {"image": "data:image/png;base64,???"},
}
GOOD: dict[str, Any] = {
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1))),
    "cmyk": lambda: encoded(Image.new("CMYK", (9, 9)), "JPEG"),
    "16 bit": lambda: encoded(Image.new("I;16", (9, 9))),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_fails_alone(client: TestClient, png: bytes, name: str) -> None:
    body = {"input": ["fine", BAD[name](png), "fine too"], "partial": True}
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    assert [item["index"] for item in answer.json()["data"]] == [0, 2]
    assert [error["index"] for error in answer.json()["errors"]] == [1]
    alone = client.post("/v1/embeddings", json={**body, "partial": False})
    assert 400 <= alone.status_code < 500 and alone.json()["error"]["param"] == "input[1]"
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize("name", GOOD)
def test_an_unusual_picture_has_a_vector(client: TestClient, name: str) -> None:
    answer = client.post("/v1/embeddings", json={"input": [{"image": data_uri(GOOD[name]())}]})
    assert answer.status_code == 200, answer.text


def test_a_lone_surrogate_fails_alone(client: TestClient) -> None:
    body = b'{"input": ["\\ud800", "fine"], "partial": true}'
    answer = client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert [item["index"] for item in answer.json()["data"]] == [1]


def test_keys_are_asked_for_and_health_is_open(serving: Callable[..., TestClient], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nfirst\nsecond\n")
    client = serving(api_key_file=tmp_path / "keys")
    assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 401
    headers = {"Authorization": "Bearer second"}
    assert client.post("/v1/embeddings", json={"input": "x"}, headers=headers).status_code == 200
    assert client.get("/health/live").status_code == 200


def test_sizes_rates_and_the_queue_are_bounded(serving: Callable[..., TestClient]) -> None:
    client = serving(max_body_bytes=1000, rate_limit=3, max_queue=2)
    assert client.post("/v1/embeddings", json={"input": "x" * 2000}).status_code == 413
    full = client.post("/v1/embeddings", json={"input": ["a", "b", "c"]})
    assert full.status_code == 429 and int(full.headers["Retry-After"]) >= 1
    answers = [client.post("/v1/embeddings", json={"input": "x"}).status_code for _ in range(2)]
    assert answers == [200, 429]


def test_paths_are_read_below_the_media_root_alone(
    serving: Callable[..., TestClient], tmp_path: Path, png: bytes
) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(png)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    client = serving(media_root=root)
    for name, status in (("a.png", 200), ("../secret.png", 403), ("link.png", 403), ("a\0.png", 403)):
        answer = client.post("/v1/embeddings", json={"input": [{"image": name}]})
        assert answer.status_code == status and str(tmp_path) not in answer.text


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fe80::1", "::ffff:10.0.0.1"])
def test_no_private_address_is_public(address: str) -> None:
    assert not is_public(address) and is_public("8.8.8.8")


def test_no_other_page_is_let_in(client: TestClient) -> None:
    answer = client.get("/v1/models", headers={"Origin": "http://elsewhere"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_openais_client_reads_vectors_and_errors(client: TestClient) -> None:
    asked = openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client, max_retries=0)
    assert len(asked.embeddings.create(model="vlm2vec", input=["a", "b"]).data[1].embedding) == 576
    with pytest.raises(openai.BadRequestError):
        asked.embeddings.create(model="vlm2vec", input="x", dimensions=9999)


def test_a_pass_that_raises_is_tried_alone_and_the_culprit_fails_alone(
    embedder: Any, serving: Callable[..., TestClient]
) -> None:
    usual, culprit = embedder.backbone.forward, embedder.backbone.tokenizer("poison poison poison")["input_ids"][0]

    def forward(batch: Any) -> Any:
        if (batch["input_ids"] == culprit).any():
            raise RuntimeError("out of luck")
        return usual(batch)

    embedder.backbone.forward = forward
    try:
        client = serving(result_cache_bytes=0)
        body = {"input": ["a", "poison", "b"], "partial": True}
        answer = client.post("/v1/embeddings", json=body).json()
        assert [item["index"] for item in answer["data"]] == [0, 2]
        assert answer["errors"][0]["code"] == "model_failed" and "luck" not in str(answer)
        assert client.get("/health/ready").status_code == 200
    finally:
        del embedder.backbone.forward


def vector_of(client: TestClient, uri: str) -> np.ndarray:
    answer = client.post("/v1/embeddings", json={"input": [{"image": uri}]})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["data"][0]["embedding"])


def test_an_animated_picture_is_its_first_frame(client: TestClient) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    moving = vector_of(
        client, data_uri(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "image/gif")
    )
    assert moving @ vector_of(client, data_uri(encoded(frames[0], "GIF"))) == pytest.approx(1.0, abs=1e-4)


def test_a_request_past_its_deadline_gets_408_and_the_next_one_an_answer(
    embedder: Any, serving: Callable[..., TestClient]
) -> None:
    usual = embedder.backbone.forward

    def slow(batch: Any) -> Any:
        time.sleep(0.6)
        return usual(batch)

    client = serving(timeout=0.3)
    embedder.backbone.forward = slow
    try:
        answer = client.post("/v1/embeddings", json={"input": "slow"})
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
    finally:
        del embedder.backbone.forward
    time.sleep(0.7)
    assert client.post("/v1/embeddings", json={"input": "fast"}).status_code == 200


def test_a_mistake_of_the_server_says_nothing_of_its_inside(
    embedder: Any, serving: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serving()

    def broken(self: Any, items: Any) -> Any:
        raise RuntimeError("inside")

    monkeypatch.setattr("vlm2vec.serving.batching.Engine.embed", broken)
    answer = client.post("/v1/embeddings", json={"input": "x"})
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "server_error"
    assert not any(word in answer.text for word in ("inside", "Traceback", "RuntimeError", ".py"))


def test_a_redirect_to_a_private_address_is_not_followed() -> None:
    reached: list[str] = []

    class Toy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/secret")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.2", 0), Toy) as toy, HTTPServer(("127.0.0.1", toy.server_port), Toy) as private:
        for one in (toy, private):
            threading.Thread(target=one.serve_forever, daemon=True).start()
        hosts = [f"127.0.0.{last}:{toy.server_port}" for last in (1, 2)]
        start = f"http://127.0.0.2:{toy.server_port}/start"
        # The toy's own address stands for a public one; the other stays what it is.
        fetcher = Fetcher(hosts, 1000, lambda address: address == "127.0.0.2" or is_public(address))
        refused = asyncio.run(fetcher.picture(start))
        direct = asyncio.run(Fetcher(hosts, 1000).picture(start))
        for one in (toy, private):
            one.shutdown()
    assert isinstance(refused, Refusal) and refused.code == "address_not_allowed" and reached == ["/start"]
    assert isinstance(direct, Refusal) and direct.code == "address_not_allowed"
