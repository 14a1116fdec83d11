"""Shared by the server tests: the application with a tiny model, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from tiny.fixtures import tiny_vlm
from tiny.models import draw_image
from wire import encoded

from vlm2vec import Embedder
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings

__all__ = ["tiny_vlm"]


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    """The built-in model in its smallest size, with different prompts for queries and documents."""
    import torch

    made = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64, dtype=torch.float32)
    made.prompts = {"query": "Find it:", "document": "Keep it:"}
    return made


@pytest.fixture(scope="session")
def png() -> bytes:
    return encoded(draw_image(40, 30, seed=1))


@pytest.fixture(scope="module")
def client(embedder: Embedder) -> Iterator[TestClient]:
    with TestClient(create_app(embedder, ServeSettings(model="compact"))) as made:
        yield made


@pytest.fixture
def serving(embedder: Embedder) -> Iterator[Callable[..., TestClient]]:
    """`serving(**settings)`: a test client of a server with these settings."""
    opened: list[TestClient] = []

    def open_client(model: Any = None, **settings: Any) -> TestClient:
        made = TestClient(create_app(model or embedder, ServeSettings(model="compact", **settings)))
        made.__enter__()
        opened.append(made)
        return made

    yield open_client
    for made in opened:
        made.__exit__(None, None, None)
