"""Reranking on the search page: the answers without a browser, and the switch in headless Chromium."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from reranked_page import Greenness
from samples import draw

from vlm2vec import Embedder
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.searching import Query, Searcher
from vlm2vec.jobs.sources import open_source
from vlm2vec.jobs.stores import facts_of
from vlm2vec.retrieval.open import open_store
from vlm2vec.serving.ui_parts import SearchPage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
SCRIPT = Path(__file__).with_name("reranked_page.py")
LIMIT = 150  # seconds of the test in the browser
PATIENCE = 60_000  # milliseconds of one wait
NAME = re.compile(r"(\w+)\.png")


@pytest.fixture(scope="module")
def searcher(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:
    folder = tmp_path_factory.mktemp("reranked") / "photos"
    for name in ("red", "green", "blue", "yellow"):
        draw(folder / f"{name}.png", name, 0)
    (folder / "note.txt").write_text("A note on colours.")
    store = open_store(str(folder.with_name("photos.lance")), create=facts_of(embedder, "compact", options={}))
    index_source(embedder, open_source(folder), store)
    yield Searcher(embedder, store)
    store.close()


def test_the_switch_orders_the_nearest_rows_by_the_reranker(searcher: Searcher) -> None:
    page = SearchPage(searcher, Greenness())  # type: ignore[arg-type]
    on = page.search(Query("red"), 24, None, rerank=True)
    assert NAME.findall(on.results or "")[0] == "green"
    assert "4 nearest, reranked" in (on.status or "")
    assert "1 left out, without a readable image" in (on.status or "")
    off = page.search(Query("red"), 24, None, rerank=False)
    assert "5 nearest ·" in (off.status or "") and "left out" not in (off.status or "")
    assert page.search(Query("red"), 1, None, rerank=True).results != off.results


def test_the_weighted_cosine_joins_the_reranker_on_the_page(searcher: Searcher) -> None:
    names = [Path(hit.key).name for hit in searcher.search(Query("red"), 24) if hit.key.endswith("png")]
    for weight, expected in ((0.0, ["green.png"]), (1e6, names)):
        page = SearchPage(searcher, Greenness(), weight)  # type: ignore[arg-type]
        found = [f"{name}.png" for name in NAME.findall(page.search(Query("red"), 24, None, rerank=True).results or "")]
        assert list(dict.fromkeys(found))[: len(expected)] == expected


def test_without_a_reranker_the_switch_does_nothing(searcher: Searcher) -> None:
    page = SearchPage(searcher)
    assert page.search(Query("red"), 24, None, rerank=True).results == page.search(Query("red"), 24, None).results


@contextmanager
def served(store: str) -> Iterator[str]:
    """The address of the page, from a process that ends with its standard input, or is killed at the time limit."""
    command = [sys.executable, str(SCRIPT), store]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        limit = threading.Timer(LIMIT, server.kill)  # ends the reading of its output and the waits of the browser
        limit.start()
        try:
            assert server.stdout is not None and server.stdin is not None
            yield next(line.split()[1] for line in server.stdout if line.startswith("Page: "))
            server.stdin.close()
            server.wait(30)
        finally:
            limit.cancel()
            server.kill()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING) or not CHROMIUM, reason="needs gradio, playwright and chromium")
def test_the_page_reranks_until_the_switch_is_turned_off(searcher: Searcher) -> None:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with served(searcher.store.uri) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.wait_for_selector("#results .cards li")
            switch = page.get_by_label("Rerank the nearest 50")
            expect(switch).to_be_checked()
            page.get_by_label("Search for").fill("red")
            page.get_by_label("Search for").press("Enter")
            expect(page.locator("#status")).to_contain_text("4 nearest, reranked")
            assert page.locator("#results .name").first.inner_text() == "green.png"
            switch.uncheck()
            page.get_by_role("button", name="Search", exact=True).click()
            expect(page.locator("#status")).to_have_text(re.compile(r"5 nearest · \d+ ms"))
        finally:
            browser.close()
