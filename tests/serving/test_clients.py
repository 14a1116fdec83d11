"""Clients of other makers over a real connection, and what a process does that the application alone does not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cohere
import httpx
import numpy as np
import pytest
from langchain_openai import OpenAIEmbeddings

from vlm2vec import Embedder
from vlm2vec.jobs.stores import facts_of
from vlm2vec.retrieval.index import open_store

TEXTS = ["a dog on the beach", "a red car", "Zürich"]


@dataclass
class Server:
    """A process of `vlm2vec serve`, and the model that it serves."""

    process: subprocess.Popen[bytes]
    url: str
    model: Embedder


@pytest.fixture(scope="module")
def server(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    embedder.save_pretrained(folder / "model")
    model = Embedder.from_pretrained(str(folder / "model"))
    store = open_store(str(folder / "texts.lance"), facts_of(model, str(folder / "model")))
    store.upsert(["a", "b", "c"], model.encode(TEXTS), [{"place": place} for place in range(3)])
    store.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from vlm2vec.cli import main; main()", "serve", str(folder / "model")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--store", str(folder / "texts.lance"), "--port", str(port)],
            env=environment,
            stderr=log,
            stdout=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, folder / "log")
        yield Server(process, url, model)
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/health/ready", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert (ours * theirs).sum(axis=1).min() >= 0.9999


def test_coheres_client_reads_the_vectors_of_the_library(server: Server) -> None:
    with httpx.Client() as wire:
        asked = cohere.ClientV2(api_key="none", base_url=server.url, httpx_client=wire)
        made = asked.embed(model="vlm2vec", input_type="search_query", embedding_types=["float"], texts=TEXTS)
    assert_same(np.array(made.embeddings.float_), server.model.encode_query(TEXTS))


def test_langchains_client_reads_the_vectors_of_the_library(server: Server) -> None:
    asked = OpenAIEmbeddings(
        model="vlm2vec", api_key="none", base_url=f"{server.url}/v1", check_embedding_ctx_length=False
    )
    made = asked.embed_documents(TEXTS)
    asked.client._client.close()
    assert_same(np.array(made), server.model.encode(TEXTS))


def test_the_store_of_the_command_line_is_searched(server: Server) -> None:
    results = httpx.post(f"{server.url}/v1/search", json={"query": TEXTS[1], "k": 3}).json()["results"]
    cosines = (server.model.encode_query(TEXTS[1:2]) @ server.model.encode(TEXTS).T)[0]
    assert [result["metadata"]["place"] for result in results] == list(np.argsort(-cosines))
    assert [result["score"] for result in results] == pytest.approx(np.sort(cosines)[::-1], abs=1e-3)


def test_an_accepted_request_is_finished_after_sigterm(server: Server) -> None:  # the last one: the server ends
    texts = [f"{number} " + "long text " * 100 for number in range(150)]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json={"input": texts}, timeout=60)
        while "vlm2vec_waiting_inputs 150.0" not in httpx.get(f"{server.url}/metrics").text:
            assert not answer.done()
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert not answer.done()
        assert answer.result().status_code == 200 and len(answer.result().json()["data"]) == 150
    server.process.wait(30)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health/live")
