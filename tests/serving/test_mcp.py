"""The MCP tools of a store through the official client: in this process, over stdio and over streamable HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from PIL import Image
from samples import COLORS, draw
from typer.testing import CliRunner
from wire import data_uri

from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.searching import PRESETS, Searcher
from vlm2vec.jobs.sources import open_source
from vlm2vec.jobs.stores import facts_of
from vlm2vec.models.embedder import Embedder
from vlm2vec.retrieval.open import open_store
from vlm2vec.serving.mcp_server import build_server

SMALL: dict[str, Any] = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
MCP = [sys.executable, "-m", "vlm2vec", "mcp"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcp") / "photos"
    for i in range(12):
        draw(folder / f"{list(COLORS)[i % 4]}_{i:02}.png", list(COLORS)[i % 4], i)
    (folder / "note.txt").write_text("A note on colors.")
    return folder


@pytest.fixture(scope="module")
def searcher(photos: Path) -> Iterator[Searcher]:
    embedder = Embedder.from_pretrained("compact", **SMALL)
    store = open_store(str(photos.with_name("photos.lance")), create=facts_of(embedder, "compact", options=SMALL))
    index_source(embedder, open_source(photos), store)
    yield Searcher(embedder, store)
    store.close()


def asked(server: Any, use: Callable[[Client], Awaitable[Any]]) -> Any:
    """What `use` returns for a connected client."""

    async def run() -> Any:
        async with Client(server) as client:
            return await use(client)

    return asyncio.run(run())


def call(searcher: Searcher, tool: str, **arguments: Any) -> Any:
    return asked(build_server(searcher, "photos.lance"), lambda client: client.call_tool(tool, arguments))


def names(result: Any) -> list[str]:
    assert not result.is_error, result.content
    return [row["name"] for row in result.structured_content["rows"]]


def test_the_tools_are_described_and_read_only(searcher: Searcher) -> None:
    found = asked(build_server(searcher, "photos.lance"), lambda client: client.list_tools()).tools
    assert {tool.name for tool in found} == {"search", "similar", "show_image", "describe_store"}
    for tool in found:
        assert tool.annotations.read_only_hint and not tool.annotations.destructive_hint and tool.description


def test_search_by_text_image_and_both_finds_what_the_searcher_finds(searcher: Searcher, photos: Path) -> None:
    png = sorted(photos.glob("*.png"))[0]
    uri = data_uri(png.read_bytes())
    by_text = call(searcher, "search", text="something red", k=5)
    assert len(names(by_text)) == 5
    scores = [row["score"] for row in by_text.structured_content["rows"]]
    assert scores == sorted(scores, reverse=True)
    assert names(call(searcher, "search", image=uri, k=1)) == [png.name]
    assert names(call(searcher, "search", image=uri.partition(",")[2], k=1)) == [png.name]  # bare base64
    key = call(searcher, "search", image=uri, k=1).structured_content["rows"][0]["key"]
    both = call(searcher, "search", text="the same in blue", image=uri, k=13)
    assert names(both) == names(call(searcher, "search", text="the same in blue", like=key, k=13))
    assert [row["score"] for row in both.structured_content["rows"]] != scores
    assert png.name not in names(call(searcher, "similar", key=key, k=12))
    filtered = names(call(searcher, "search", text="red", where="v2v_path LIKE '%yellow%'"))
    assert filtered and all("yellow" in name for name in filtered)


def test_an_image_is_shown_as_image_content(searcher: Searcher, photos: Path) -> None:
    hit = call(searcher, "search", text="red", where="v2v_path LIKE '%.png'", k=1).structured_content["rows"][0]
    (content,) = call(searcher, "show_image", key=hit["key"]).content
    assert content.type == "image" and content.mime_type == "image/jpeg"
    with Image.open(io.BytesIO(base64.b64decode(content.data))) as shown, Image.open(photos / hit["name"]) as stored:
        assert shown.size == stored.size


def test_the_store_lists_its_fields_and_tasks(searcher: Searcher) -> None:
    about = call(searcher, "describe_store").structured_content
    assert about["rows"] == 13 and about["model"] == "compact" and about["tasks"] == PRESETS
    assert {"path", "width", "height"} <= set(about["fields"]) and "thumbnail" not in about["fields"]
    for condition in about["filter_examples"]:
        assert not call(searcher, "search", text="red", where=condition).is_error


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("search", {}, "the query is empty"),
        ("search", {"text": "a", "k": 0}, "k 0: expected 1 to 100"),
        ("search", {"image": "/etc/passwd"}, "image: not an image"),
        ("search", {"image": "data:image/png;base64,aGVsbG8="}, "not an image in a supported format"),
        ("search", {"image": "not base64!"}, "image: expected a data URI or base64"),
        ("search", {"image": "x", "like": "y"}, "expected one of them"),
        ("search", {"text": "a", "where": "nonsense ("}, ""),
        ("show_image", {"key": "none.png"}, "the store has no such row"),
        ("similar", {"key": "none.png"}, "no row 'none.png'"),
    ],
)
def test_a_mistake_of_the_client_is_an_error_of_the_tool(
    searcher: Searcher, tool: str, arguments: dict[str, Any], message: str
) -> None:
    result = call(searcher, tool, **arguments)
    assert result.is_error and message in result.content[0].text
    assert "Traceback" not in result.content[0].text


def test_a_row_of_text_has_no_image(searcher: Searcher) -> None:
    (row,) = call(searcher, "search", text="a", where="v2v_path LIKE '%note%'").structured_content["rows"]
    result = call(searcher, "show_image", key=row["key"])
    assert result.is_error and "the row has no image" in result.content[0].text


async def exchange(client: Client) -> tuple[Any, Any]:
    rows = (await client.call_tool("search", {"text": "red", "where": "v2v_path LIKE '%.png'"})).structured_content[
        "rows"
    ]
    return rows, (await client.call_tool("show_image", {"key": rows[0]["key"]})).content[0]


@pytest.mark.slow
def test_the_command_serves_stdio_and_http_alike(searcher: Searcher, photos: Path, tmp_path: Path) -> None:
    words = ["--store", str(photos.with_name("photos.lance"))]
    here, _ = asked(build_server(searcher, "photos.lance"), exchange)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parameters = StdioServerParameters(command=MCP[0], args=[*MCP[1:], *words], env=environment)
    rows, image = asked(parameters, exchange)
    assert [row["key"] for row in rows] == [row["key"] for row in here] and image.type == "image"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*MCP, *words, "--http", "--port", str(port)], env=environment, stderr=log, stdout=log
        )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert asked(f"http://127.0.0.1:{port}/mcp", exchange)[0] == rows
    finally:
        server.kill()
        server.wait()


def test_a_missing_library_or_store_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, message in ((False, "no such store"), (True, "pip install 'vlm2vec[mcp]'")):
        if missing:
            monkeypatch.delitem(sys.modules, "vlm2vec.serving.mcp_server")
            monkeypatch.setitem(sys.modules, "mcp.server", None)
        failed = CliRunner().invoke(app, ["mcp", "--store", str(tmp_path / "none.lance")])
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)
