"""The OpenAPI schema is accurate: generated requests, valid and invalid, get only documented responses and no 5xx."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import uvicorn

from vlm2vec import Embedder
from vlm2vec.jobs.stores import facts_of
from vlm2vec.retrieval.open import open_store
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings

CONFIG = {
    "seed": 0,
    "checks": {
        "positive_data_acceptance": {"enabled": False}
    },  # valid by schema, yet a text may not be an image and a number may exceed the dimensions
    "generation": {"max-examples": 25, "deterministic": True, "database": "none", "no-shrink": True},
}


PATHS: Any = create_app(None, ServeSettings(model="compact")).openapi()  # type: ignore[arg-type]
SCHEMA = schemathesis.openapi.from_dict(PATHS, config=schemathesis.Config.from_dict(CONFIG))


@pytest.fixture(scope="module")
def url(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server with a vector store."""
    store = open_store(str(tmp_path_factory.mktemp("store") / "texts.lance"), facts_of(embedder, "compact"))
    store.upsert(["a", "b"], embedder.encode(["a dog", "a red car"]), [{"place": place} for place in range(2)])
    app = create_app(embedder, ServeSettings(model="compact"), store)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    store.close()


def examples() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path, operations in PATHS["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if body:
            name = body["schema"]["$ref"].rpartition("/")[2]
            found += [(path, example) for example in PATHS["components"]["schemas"][name]["examples"]]
    return found


@pytest.mark.parametrize(("path", "body"), examples(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_examples_of_the_schema_succeed_as_it_declares(path: str, body: dict[str, Any], url: str) -> None:
    case = SCHEMA[path]["POST"].Case(body=body, media_type="application/json")
    assert case.call_and_validate(base_url=url).status_code == 200


@SCHEMA.parametrize()
def test_answers_are_those_that_the_schema_declares(case: schemathesis.Case, url: str) -> None:
    case.call_and_validate(base_url=url)
