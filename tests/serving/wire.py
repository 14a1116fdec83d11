"""Helpers of the server tests: encoded images, request bodies and a toy server to fetch from."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image
from starlette.testclient import TestClient


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def post(client: TestClient, path: str = "/v1/embeddings", headers: dict[str, str] | None = None, **body: Any) -> Any:
    """Like `client.post(json=body)`, but lone surrogates are sent as JSON escapes."""
    about = {"Content-Type": "application/json", **(headers or {})}
    return client.post(path, content=json.dumps(body).encode(), headers=about)


class Toy(ThreadingHTTPServer):
    """A server that calls `answer(handler)` and records the requested paths."""

    daemon_threads = True

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None], address: str, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                toy.asked.append(self.path)
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__((address, port), Handler)
        toy = self
        self.asked: list[str] = []
        self.url = f"http://{address}:{self.server_port}"

    def handle_error(self, *_: Any) -> None:  # clients disconnect early in these tests
        pass


@contextmanager
def toy_server(
    answer: Callable[[BaseHTTPRequestHandler], None], address: str = "127.0.0.1", port: int = 0
) -> Iterator[Toy]:
    with Toy(answer, address, port) as toy:
        thread = threading.Thread(target=toy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield toy
        finally:
            toy.shutdown()
            thread.join()
