"""A model behind an endpoint gives the vectors and scores of the same local model; requests are batched and retried."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from evaluation.toys import write_toy_benchmark
from PIL import Image
from typer.testing import CliRunner

from vlm2vec import Embedder
from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.evaluation.endpoint import Endpoint, EndpointEngine, chat_of, string_of
from vlm2vec.media.images import ImageRef
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings
from vlm2vec.types import EmbeddingInput

SMALL: dict[str, Any] = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_pretrained("compact", dtype=torch.float32, **SMALL)


@pytest.fixture(scope="module")
def url(embedder: Embedder) -> Iterator[str]:
    """`vlm2vec serve` on a port of this machine."""
    server_app = create_app(embedder, ServeSettings(model="compact", served_names=("small", "other")))
    server = uvicorn.Server(uvicorn.Config(server_app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def image(colour: str) -> ImageRef:
    return ImageRef.of(Image.new("RGB", (40, 30), colour))


INPUTS = [
    EmbeddingInput(text="a dog"),
    EmbeddingInput(text="the same", images=(image("red"),)),
    EmbeddingInput(images=(image("blue"),), instruction="Find the colour"),
    EmbeddingInput(text="word " * 700),  # longer than the model reads
]


@pytest.mark.parametrize("dialect", ["objects", "messages"])
def test_vectors_are_those_of_the_library_in_both_image_dialects(url: str, embedder: Embedder, dialect: Any) -> None:
    engine = EndpointEngine(Endpoint(url, "small", dialect, batch_size=2))
    made = engine.encode(INPUTS)
    assert (made * embedder.encode(INPUTS)).sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    assert engine.num_encoded == len(INPUTS) and engine.size == {"embedding_dimension": embedder.embedding_dim}


def test_the_dialect_of_our_server_is_found_and_takes_placeholders(url: str, embedder: Embedder) -> None:
    engine = EndpointEngine(Endpoint(url, "other"))
    item = EmbeddingInput(text="<|image_1|>\nand <|image_2|>", images=(image("red"), image("blue")))
    assert engine.dialect == "objects"
    assert engine.encode([item])[0] @ embedder.encode([item])[0] == pytest.approx(1.0, abs=1e-4)


def test_an_evaluation_over_http_has_the_scores_of_the_local_one_and_encodes_once(
    url: str, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = write_toy_benchmark(tmp_path / "colours")
    embedder.save_pretrained(tmp_path / "model")

    def scores(source: str, name: str, *more: str) -> Any:
        command = [
            "eval",
            source,
            "--benchmark",
            benchmark,
            "-o",
            tmp_path / name,
            "--cache",
            tmp_path / "cache",
            *more,
        ]
        done = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found = json.loads((tmp_path / name / "results.json").read_text())
        return found["model"], {task: row["score"] for task, row in found["tasks"].items()}

    asked: list[int] = []
    usual = EndpointEngine._embed
    monkeypatch.setattr(
        EndpointEngine, "_embed", lambda self, body: (asked.append(len(body["input"])), usual(self, body))[1]
    )
    _, local = scores(str(tmp_path / "model"), "local")
    assert scores(url, "http", "--model", "small") == ("small", local)
    assert max(asked) == 32 and sum(asked) == 3 + 60 + 10 + 10  # probes, then each distinct input once
    assert scores(url + "/", "again", "--model", "small") == ("small", local)
    assert sum(asked) == 2 * 3 + 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{url}"], "name of the model is missing; add --model NAME"),
        (["{url}", "--model", "smal"], "no model smal; expected one of: small, other"),
        (
            ["{url}", "--model", "small", "--option", "dialekt=objects"],
            "unknown setting of an endpoint; did you mean dialect",
        ),
        (["{url}", "--model", "small", "--option", "dialect=text"], "expected one of objects, messages, strings"),
        (["{url}", "--model", "small", "--option", "batch_size=0"], "batch_size=0: expected a positive number"),
        (["compact", "--model", "small"], "--model small: only for an endpoint's URL"),
        (["http://127.0.0.1:9/v1", "--model", "x", "--option", "attempts=1"], "1 attempts failed"),
    ],
)
def test_a_wrong_endpoint_is_one_line(url: str, tmp_path: Path, words: list[str], message: str) -> None:
    benchmark = write_toy_benchmark(tmp_path / "colours")
    given = [word.format(url=url) for word in words]
    done = CliRunner().invoke(app, ["eval", *given, "--benchmark", str(benchmark), "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def toy() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """`toy(answer)`: address and requests of a server that calls `answer(number, body)` for status, headers, JSON."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[int, Any], tuple[int, dict[str, str], Any]]) -> tuple[str, list[Any]]:
        asked: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((body, dict(self.headers)))
                status, headers, content = answer(len(asked), body)
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def embedded(body: Any) -> dict[str, Any]:
    """Vectors as plain numbers, last one first, as a server may send them."""
    rows = [{"index": i, "embedding": [1.0, float(len(str(text)))]} for i, text in enumerate(body["input"])]
    return {"data": rows[::-1]}


def test_a_busy_server_is_asked_again_and_order_is_by_index(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("vlm2vec.evaluation.endpoint.time.sleep", waits.append)
    monkeypatch.setenv("VLM2VEC_API_KEY", "secret")
    states = {1: (429, {"Retry-After": "7"}, {"error": {"message": "busy"}}), 2: (503, {}, {})}
    url, asked = toy(lambda number, body: states.get(number) or (200, {}, embedded(body)))
    engine = EndpointEngine(Endpoint(url, "m", "strings"))
    assert waits == [0.0, 7.0, 1.0] and asked[0][1]["Authorization"] == "Bearer secret"
    made = engine.encode([EmbeddingInput(text="a"), EmbeddingInput(text="bbb")])
    want = np.array([[1, 1], [1, 3]]) / np.sqrt([[2], [10]])
    assert made == pytest.approx(want)
    assert "truncate_prompt_tokens" not in asked[-1][0]  # not part of OpenAI's schema


@pytest.mark.parametrize(
    ("answer", "message", "times"),
    [
        ((400, {}, {"error": {"message": "input 0: too long"}}), "request refused: 400 input 0: too long", 1),
        ((500, {}, {"detail": "x"}), "2 attempts failed", 2),
        ((200, {}, {"data": []}), "expected data[].embedding", 1),
        ((200, {}, {"data": [{"index": 0, "embedding": [1.0]}]}), "expected 3 finite vectors, got 1", 1),
        ((200, {}, ["x"]), "unexpected response", 1),
    ],
)
def test_a_failing_server_is_one_line(
    toy: Any, monkeypatch: pytest.MonkeyPatch, answer: Any, message: str, times: int
) -> None:
    monkeypatch.setattr("vlm2vec.evaluation.endpoint.time.sleep", lambda seconds: None)
    url, asked = toy(lambda number, body: answer)
    with pytest.raises(UserError) as error:
        EndpointEngine(Endpoint(url, "m", "strings", attempts=2))
    assert message in str(error.value) and url in str(error.value) and len(asked) == times


def test_a_chat_has_images_where_their_placeholders_are() -> None:
    item = EmbeddingInput(text="left <|image_2|>\nright <|image_1|> end", images=(image("red"), image("blue")))
    (turn,) = chat_of(item)
    kinds = [part.get("text") or part["image_url"]["url"] for part in turn["content"]]
    red, blue = (chat_of(EmbeddingInput(images=(one,)))[0]["content"][0]["image_url"]["url"] for one in item.images)
    assert kinds == ["left ", blue, "right ", red, " end"]
    assert chat_of(EmbeddingInput(text="a", instruction="b"))[0] == {"role": "system", "content": "b"}


def test_a_text_endpoint_refuses_images() -> None:
    with pytest.raises(UserError, match="takes text alone"):
        string_of(INPUTS[1])
    assert string_of(EmbeddingInput(text="a", instruction="b")) == "b a"
