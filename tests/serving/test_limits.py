"""Queue limits, sizes, timeouts and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from wire import data_uri, post

from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings


def test_a_body_that_is_too_large_gets_413_with_and_without_content_length(serving: Callable[..., TestClient]) -> None:
    client = serving(max_body_bytes=1000)
    body = json.dumps({"input": "x" * 2000}).encode()
    parts = (body[at : at + 500] for at in range(0, len(body), 500))
    for content in (body, parts):
        answer = client.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ({"max_chars": 3}, "text_too_long"),
        ({"max_tokens": 3}, "too_many_tokens"),
        ({"max_inputs": 1}, "too_many_inputs"),
        ({"max_images": 1}, "too_many_images"),
        ({"max_image_bytes": 50}, "image_too_large"),
        ({"max_pixels": 100}, "image_too_large"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_an_input_over_a_limit_gets_413(
    serving: Callable[..., TestClient], png: bytes, limit: dict[str, int], code: str
) -> None:
    both = {"text": "a dog and a cat on the beach", "images": [data_uri(png), data_uri(png)]}
    answer = post(serving(**limit), input=[both, "and another text"])
    assert answer.status_code == 413 and answer.json()["error"]["code"] == code


@pytest.fixture
def held(
    embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, threading.Event, list[int]]]:
    """Forward passes block until the test releases them: (started, release, batch sizes)."""
    usual, begun, go_on, sizes = embedder.backbone.forward, threading.Event(), threading.Event(), []

    def forward(batch: Any) -> Any:
        sizes.append(len(batch.lengths()))
        begun.set()
        go_on.wait(20)
        return usual(batch)

    monkeypatch.setattr(embedder.backbone, "forward", forward)
    yield begun, go_on, sizes
    go_on.set()


def test_a_full_queue_answers_429_with_retry_after(serving: Callable[..., TestClient], held: Any) -> None:
    started, release, _ = held
    client = serving(max_queue=3, max_batch_inputs=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, client, input=["a", "b"])
        started.wait(20)
        full = post(client, input=["c", "d"])
        assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
        assert int(full.headers["Retry-After"]) >= 1
        release.set()
        assert first.result().status_code == 200
    assert post(client, input=["c", "d"]).status_code == 200


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_a_request_larger_than_the_queue_passes_in_slices(
    serving: Callable[..., TestClient], embedder: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    client, waiting = serving(max_queue=4), []
    engine: Any = client.app.state.serving.engine  # type: ignore[attr-defined]
    usual = engine.observer.waiting
    monkeypatch.setattr(engine.observer, "waiting", lambda more: (waiting.append(engine.num_waiting), usual(more)))
    texts = [f"text {number}" for number in range(count)] * 2
    answer = post(client, input=texts)
    assert answer.status_code == 200, answer.text
    made = np.array([item["embedding"] for item in answer.json()["data"]])
    assert (made * embedder.encode(texts)).sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    assert max(waiting) == (count if count <= 4 else 2) and waiting[-1] == 0  # half of the queue stays free


def test_the_largest_request_is_accepted_by_default_settings(serving: Callable[..., TestClient]) -> None:
    texts = [f"text {number}" for number in range(ServeSettings(model="compact").max_inputs)]
    assert len(texts) > ServeSettings(model="compact").max_queue
    answer = post(serving(), input=texts)
    assert answer.status_code == 200 and len(answer.json()["data"]) == len(texts)


def test_a_large_request_waits_for_the_queue_while_small_ones_hold_it(
    serving: Callable[..., TestClient], held: Any
) -> None:
    started, release, _ = held
    client = serving(max_queue=4, max_batch_inputs=1)
    with ThreadPoolExecutor(2) as pool:
        small = pool.submit(post, client, input=["a", "b", "c"])
        started.wait(20)
        large = pool.submit(post, client, input=[f"text {number}" for number in range(9)])
        release.set()
        assert small.result().status_code == large.result().status_code == 200


def test_a_request_past_its_timeout_gets_408_and_the_next_one_succeeds(
    serving: Callable[..., TestClient], held: Any
) -> None:
    _, go_on, _ = held
    client = serving(timeout=1.5)
    answer = post(client, input="slow")
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "timeout"
    go_on.set()
    assert post(client, input="fast").status_code == 200


SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "path": "/v1/embeddings",
    "raw_path": b"/v1/embeddings",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 80),
    "scheme": "http",
}


def test_a_body_that_arrives_too_slowly_gets_408(embedder: Any) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        app = create_app(embedder, ServeSettings(model="compact", timeout=0.2))
        async with app.router.lifespan_context(app):
            await app({**SCOPE, "state": {}}, receive, send)

    asyncio.run(run())
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "timeout"


def test_inputs_of_a_disconnected_client_are_not_computed(embedder: Any, held: Any) -> None:
    begun, go_on, sizes = held
    body = json.dumps({"input": ["one", "two", "three", "four"]}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        if message := next(messages, None):
            return message
        await asyncio.to_thread(begun.wait, 20)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("the client is gone")

    async def run() -> int:
        app = create_app(embedder, ServeSettings(model="compact", max_batch_inputs=1))
        async with app.router.lifespan_context(app):
            await app({**SCOPE, "state": {}}, receive, send)
            engine = app.state.serving.engine
            waiting = engine.num_waiting
            go_on.set()
            while engine._ready:
                await asyncio.sleep(0.01)
            return waiting

    since = time.monotonic()
    assert asyncio.run(run()) == 0
    assert sizes == [1] and time.monotonic() - since < 10
