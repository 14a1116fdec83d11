"""`vlm2vec search --server`: the request, and the message if the server response is unexpected."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from vlm2vec import UserError
from vlm2vec.cli import run
from vlm2vec.jobs.remote_search import search_server
from vlm2vec.jobs.searching import PRESETS, Query
from vlm2vec.media.images import ImageRef
from vlm2vec.serving.schemas import SearchRequest

ROW = {"key": "a.png", "score": 0.5, "metadata": {"place": 1}}


class Toy(BaseHTTPRequestHandler):
    """Answers every request with `status` and `answer`, and keeps the last request."""

    status, answer = 200, b""
    asked: ClassVar[dict[str, Any]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.update(path=self.path, key=self.headers["Authorization"], body=json.loads(body))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Toy)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(Toy, "answer", json.dumps({"results": [ROW]}).encode())
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_request_has_text_image_instruction_and_key_in_the_form_that_the_server_reads(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM2VEC_API_KEY", "secret")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.bmp")
    query = Query("in blue", ImageRef(path=str(tmp_path / "red.bmp")), "retrieval")
    hits = search_server(f"{toy}/", query, 3, "place = 1")
    assert [(hit.key, hit.score, hit.metadata) for hit in hits] == [("a.png", 0.5, {"place": 1})]
    assert Toy.asked["path"] == "/v1/search" and Toy.asked["key"] == "Bearer secret"
    read: Any = SearchRequest.model_validate(Toy.asked["body"])
    assert (read.k, read.where, read.query.text) == (3, "place = 1", "in blue")
    assert read.query.instruction == PRESETS["retrieval"] and read.query.images[0].startswith("data:image/png;base64,")


BAD_ANSWERS = [
    (400, b'{"error": {"message": "no column sky"}}', "no column sky"),
    (502, b"<html>", "Bad Gateway"),
    (200, b"<html>", "not a JSON answer; expected the address of a vlm2vec serve --store"),
    (200, b'{"hits": []}', "unexpected answer; expected the address of a vlm2vec serve --store"),
]


@pytest.mark.parametrize(("status", "answer", "words"), BAD_ANSWERS)
def test_an_answer_that_is_not_a_result_is_one_clear_line(
    toy: str, monkeypatch: pytest.MonkeyPatch, status: int, answer: bytes, words: str
) -> None:
    monkeypatch.setattr(Toy, "status", status)
    monkeypatch.setattr(Toy, "answer", answer)
    with pytest.raises(UserError, match=words) as caught:
        search_server(toy, Query("a dog"))
    assert "\n" not in str(caught.value)


MISTAKES = [
    (["--server", "http://127.0.0.1:9"], "start it with: vlm2vec serve MODEL --store STORE"),
    (["--server", "localhost:8000"], "expected an address such as http://127.0.0.1:8000"),
    (["--server", "http://127.0.0.1:9", "--store", "a.lance"], "--store cannot be combined with --server"),
    (["--server", "http://127.0.0.1:9", "--html", "a.html"], "--html cannot be combined with --server"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["search", "a dog", *arguments]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
