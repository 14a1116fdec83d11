"""Third-party clients over a real connection, and the behavior of server processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from langchain_openai import OpenAIEmbeddings
from typer.testing import CliRunner
from wire import data_uri

from vlm2vec import Embedder
from vlm2vec.cli import app
from vlm2vec.jobs.stores import facts_of
from vlm2vec.retrieval.open import open_store

ROOT = Path(__file__).parents[2]
TEXTS = ["a dog on the beach", "a red car", "Zürich"]
SERVE = [sys.executable, "-c", "from vlm2vec.cli import main; main()", "serve"]
LONG = [f"{number} " + "long text " * 100 for number in range(150)]


@dataclass
class Server:
    """The processes of `vlm2vec serve --workers 2` and their model."""

    process: subprocess.Popen[bytes]
    port: int
    model: Embedder
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> set[int]:
        """The processes that answered requests."""
        lines = [json.loads(line) for line in (self.folder / "log").read_text().splitlines() if line.startswith("{")]
        return {line["pid"] for line in lines if line["event"] == "request"}

    def metric(self, name: str) -> float:
        """Sum of the lines of a metric."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def server(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    embedder.save_pretrained(folder / "model")
    model = Embedder.from_pretrained(str(folder / "model"), dtype=torch.float32)
    facts = facts_of(model, str(folder / "model"), dtype=torch.float32)
    store = open_store(str(folder / "texts.lance"), facts)
    store.upsert(["a", "b", "c"], model.encode(TEXTS), [{"place": place} for place in range(3)])
    store.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*SERVE, str(folder / "model"), "--store", str(folder / "texts.lance"), "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--workers", "2", "--dtype", "float32"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=log,
            stdout=log,
        )
    made = Server(process, port, model, folder)
    try:
        wait_until(lambda: is_ready(made), made)
        yield made
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def is_ready(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool], server: Server) -> None:
    for _ in range(1800):
        assert server.process.poll() is None, (server.folder / "log").read_text()
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError((server.folder / "log").read_text())


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert (ours * theirs).sum(axis=1).min() >= 0.9999


def test_openais_client_reads_the_vectors_of_the_library(server: Server, png: bytes) -> None:
    with httpx.Client() as wire:
        client = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", http_client=wire, max_retries=0)
        made = client.embeddings.create(model="vlm2vec", input=TEXTS)
        assert_same(np.array([item.embedding for item in made.data]), server.model.encode(TEXTS))
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="vlm2vec", input="x", dimensions=9999)


def test_openais_client_sends_images_in_the_dialects_of_infinity_jina_and_vllm(server: Server, png: bytes) -> None:
    both: Any = {"text": "in red", "image": data_uri(png)}
    parts = [{"type": "image_url", "image_url": {"url": data_uri(png)}}, {"type": "text", "text": "in red"}]
    chat = {"model": "vlm2vec", "messages": [{"role": "user", "content": parts}], "encoding_format": "float"}
    with httpx.Client() as wire:
        client = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", http_client=wire, max_retries=0)
        made = [
            client.embeddings.create(model="vlm2vec", input=[data_uri(png)], extra_body={"modality": "image"}),
            client.embeddings.create(model="vlm2vec", input=[both]),
            client.post(
                "/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=chat
            ),  # as in vLLM's documentation
        ]
    want = server.model.encode([{"image": png}, *[{"text": "in red", "image": png}] * 2])
    assert_same(np.array([one.data[0].embedding for one in made]), want)


def test_coheres_client_reads_the_vectors_of_the_library(server: Server) -> None:
    with httpx.Client() as wire:
        asked = cohere.ClientV2(api_key="none", base_url=server.url, httpx_client=wire)
        made = asked.embed(model="vlm2vec", input_type="search_query", embedding_types=["float"], texts=TEXTS)
        ranked = asked.rerank(model="vlm2vec", query=TEXTS[1], documents=TEXTS).results
    assert_same(np.array(made.embeddings.float_), server.model.encode_query(TEXTS))
    cosines = (server.model.encode_query(TEXTS[1:2]) @ server.model.encode_document(TEXTS).T)[0]
    assert [result.index for result in ranked] == list(np.argsort(-cosines))


def test_langchains_client_reads_the_vectors_of_the_library(server: Server) -> None:
    asked = OpenAIEmbeddings(
        model="vlm2vec", api_key="none", base_url=f"{server.url}/v1", check_embedding_ctx_length=False
    )
    made = asked.embed_documents(TEXTS)
    asked.client._client.close()
    assert_same(np.array(made), server.model.encode(TEXTS))


def test_llamaindexs_client_reads_the_vectors_of_the_library(server: Server) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    with httpx.Client() as wire:
        asked = OpenAIEmbedding(model_name="vlm2vec", api_key="none", api_base=f"{server.url}/v1", http_client=wire)
        made = asked.get_text_embedding_batch(TEXTS)
        query = asked.get_query_embedding(TEXTS[1])
    assert_same(np.array([*made, query]), server.model.encode([*TEXTS, TEXTS[1]]))


def test_verify_finds_equal_vectors(server: Server) -> None:
    done = CliRunner().invoke(app, ["verify", str(server.folder / "model"), "--against", "server", "--url", server.url])
    assert done.exit_code == 0, done.output
    cosines = [float(found) for found in re.findall(r"cosine (\S+)", done.output)]
    assert len(cosines) == 13 and min(cosines) >= 0.9999


def curl_lines() -> list[str]:
    """The curl commands of the documentation, continuation lines joined."""
    found = []
    for page in (ROOT / "README.md", ROOT / "docs/guides/serving.md"):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            found += [line for line in block.replace("\\\n", "").splitlines() if line.startswith("curl ")]
    return found


@pytest.mark.parametrize("line", curl_lines())
def test_the_curl_commands_of_the_documentation_succeed(server: Server, png: bytes, tmp_path: Path, line: str) -> None:
    (tmp_path / "photo.png").write_bytes(png)
    assert "http://127.0.0.1:8000/" in line
    done = subprocess.run(
        ["bash", "-c", line.replace("http://127.0.0.1:8000", server.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert "error" not in (json.loads(done.stdout) if done.stdout.startswith("{") else {}), done.stdout


def test_the_store_of_the_command_line_is_searched(server: Server) -> None:
    results = httpx.post(f"{server.url}/v1/search", json={"query": TEXTS[1], "k": 3}).json()["results"]
    cosines = (server.model.encode_query(TEXTS[1:2]) @ server.model.encode(TEXTS).T)[0]
    assert [result["metadata"]["place"] for result in results] == list(np.argsort(-cosines))
    assert [result["score"] for result in results] == pytest.approx(np.sort(cosines)[::-1], abs=1e-3)


def test_the_command_line_asks_the_server_without_loading_a_model(server: Server) -> None:
    want = httpx.post(f"{server.url}/v1/search", json={"query": TEXTS[1], "k": 2}).json()["results"]
    code = (
        "import sys; from vlm2vec.cli import run; status = run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'lancedb'} & set(sys.modules); sys.exit(str(heavy) if heavy else status)"
    )
    asked = ["search", TEXTS[1], "--server", server.url, "-k", "2", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [hit["key"] for hit in found] == [hit["key"] for hit in want]
    assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in want], abs=1e-6)


def test_it_binds_to_loopback_by_default(server: Server) -> None:
    listening = {
        connection.laddr.ip
        for process in [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.port
    }
    assert listening == {"127.0.0.1"}


def ask(server: Server, texts: list[str]) -> Any:
    return httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=60)


@pytest.mark.slow
def test_two_workers_return_equal_vectors_and_a_dead_one_is_replaced(server: Server) -> None:
    texts = [f"text {number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:

        def both_answer() -> bool:
            answers = list(pool.map(lambda text: ask(server, [text]), texts))
            assert_same(np.array([one.json()["data"][0]["embedding"] for one in answers]), server.model.encode(texts))
            return len(server.workers()) >= 2

        wait_until(both_answer, server)
    before = server.workers()
    assert len(before) == 2
    counted = server.metric('vlm2vec_requests_total{path="/v1/embeddings",status="200"}')
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: (is_ready(server), len(server.workers() - before) == 1)[1], server)
    assert ask(server, texts[:1]).status_code == 200
    # Metrics sum both workers and keep the counts of the dead one.
    assert server.metric('vlm2vec_requests_total{path="/v1/embeddings",status="200"}') == counted + 1


def test_the_inputs_of_a_disconnected_client_are_dropped(server: Server) -> None:
    body = json.dumps({"input": [f"left {text}" for text in LONG]}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: server.metric("vlm2vec_waiting_inputs") == 150, server)
    wait_until(lambda: server.metric("vlm2vec_waiting_inputs") == 0, server)
    assert server.metric('vlm2vec_requests_total{path="/v1/embeddings",status="499"}') == 1


def test_an_accepted_request_is_finished_after_sigterm(
    server: Server,
) -> None:  # must be the last test: it stops the server
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, LONG)
        while server.metric("vlm2vec_waiting_inputs") != 150:
            assert not answer.done()
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert not answer.done()
        assert answer.result().status_code == 200 and len(answer.result().json()["data"]) == 150
    assert server.process.wait(30) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health/live")
