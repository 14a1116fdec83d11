"""The search page in headless Chromium: typing, dropping an image and clicking, at two widths, light and dark."""

from __future__ import annotations

import base64
import importlib.util
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import COLORS, draw
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.searching import PRESETS
from vlm2vec.jobs.sources import open_source
from vlm2vec.jobs.stores import facts_of
from vlm2vec.models.embedder import Embedder
from vlm2vec.retrieval.open import open_store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium (apt-get install chromium)"]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the tests of the search page need {', '.join(MISSING)}")
SHOTS = Path(__file__).parents[2] / "runs/ui-screenshots"
PATIENCE = 40_000  # milliseconds; a search takes seconds on a busy machine
SMALL = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
HOSTILE = "<img src=x onerror=boom()> ${boom()} {{boom}} 'x' \"y\".png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "photos"
    for i in range(40):
        draw(folder / f"{list(COLORS)[i % 4]}_{i:02}.png", list(COLORS)[i % 4], i)
    draw(folder / HOSTILE, "red", 99)
    (folder / "note.txt").write_text("A note on colours & their <b>names</b>. " * 9)
    return folder


def free_port() -> int:
    """A port that the system reports as free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def address(photos: Path) -> Iterator[str]:
    """`vlm2vec ui` on a store of 41 images and a text, with the smallest built-in model."""
    embedder = Embedder.from_pretrained("compact", **SMALL)
    store = open_store(str(photos.with_name("photos.lance")), create=facts_of(embedder, "compact", options=SMALL))
    index_source(embedder, open_source(photos), store)
    command = [sys.executable, "-m", "vlm2vec.cli", "ui", "--store", store.uri, "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = iter(server.stdout.readline, "")
        yield next(line.split()[1] for line in said if line.startswith("Page: "))
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, address: str) -> Iterator[Any]:
    """Open the page; afterwards check that it called no other host and that no script failed."""
    opened, asked, wrong = [], [], []

    def go(width: int = 1280, height: int = 900, color_scheme: str = "light") -> Any:
        page = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#results .cards li")
        opened.append(page)
        return page

    yield go
    for page in opened:
        page.context.close()
    assert [
        url for url in asked if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))
    ] == []
    assert wrong == []


def keep(page: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def names(page: Any) -> list[str]:
    return page.locator("#results .name").all_inner_texts()


def scores(page: Any) -> list[float]:
    return [float(text) for text in page.locator("#results .score").all_inner_texts()]


def expect(place: Any) -> Any:
    from playwright.sync_api import expect as expect_of

    expect_of.set_options(timeout=PATIENCE)
    return expect_of(place)


def said(page: Any, pattern: str) -> str:
    """Wait for a status line."""
    expect(page.locator("#status")).to_have_text(re.compile(pattern))
    return page.inner_text("#status")


DROP = """(target, [name, encoded]) => {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const moved = new DataTransfer();
  moved.items.add(new File([bytes], name, { type: "image/png" }));
  for (const kind of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(kind, { dataTransfer: moved, bubbles: true, cancelable: true }));
}"""


def drop(page: Any, image: Path) -> None:
    target = page.locator("#image button").first.element_handle()
    page.evaluate(
        f"([target, file]) => ({DROP})(target, file)",
        [target, [image.name, base64.b64encode(image.read_bytes()).decode()]],
    )


def test_a_text_is_typed_and_enter_shows_the_nearest_with_scores(visit: Any) -> None:
    page = visit()
    assert page.title() == "photos.lance · vlm2vec"
    assert page.inner_text("#status") == "42 rows in this store; showing the first 24" and not scores(page)
    assert page.evaluate("document.activeElement.closest('#text') !== null")
    page.keyboard.type("something red")
    page.keyboard.press("Enter")
    said(page, r"24 nearest · \d+ ms")
    assert len(scores(page)) == 24 and scores(page) == sorted(scores(page), reverse=True)
    keep(page, "wide-text")


def test_a_dropped_image_finds_itself_alone_and_with_a_text(visit: Any, photos: Path) -> None:
    page = visit()
    drop(page, photos / "green_01.png")
    said(page, "24 nearest")
    assert "green_01.png" in names(page)[:3] and scores(page)[0] > 0.99
    alone = scores(page)
    page.get_by_label("Search for").fill("the same in blue")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_function(
        "first => document.querySelector('#results .score').innerText !== first", arg=f"{alone[0]:.3f}"
    )
    keep(page, "wide-both")


def test_a_result_opens_and_leads_to_similar_images(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="blue_10.png: show details").click()
    detail = page.locator("#detail .detail")
    expect(detail).to_contain_text("blue_10.png")
    assert "width" in detail.inner_text() and "40" in detail.inner_text()
    keep(page, "wide-detail")
    detail.get_by_role("button", name="Similar to this").click()
    said(page, "24 nearest to blue_10.png")
    assert "blue_10.png" not in names(page) and all("blue" in name for name in names(page)[:9])
    page.keyboard.press("Escape")
    expect(detail).to_have_count(0)
    page.get_by_role("button", name="Similar to blue_14.png").press("Enter")
    said(page, "24 nearest to blue_14.png")


def test_a_filter_applies_to_every_search_and_a_wrong_filter_is_one_line(visit: Any) -> None:
    page = visit()
    page.get_by_label("Filter").fill("path LIKE '%yellow%'")
    page.get_by_label("Search for").fill("red")
    page.get_by_label("Search for").press("Enter")
    said(page, "10 nearest")
    assert len(names(page)) == 10 and all("yellow" in name for name in names(page))
    page.get_by_role("button", name="Similar to yellow_03.png").click()
    said(page, "9 nearest to yellow_03.png")
    page.get_by_label("Filter").fill("sky = 1")
    page.get_by_label("Filter").press("Enter")
    said(page, "No field named sky")
    assert len(names(page)) == 9


def test_a_task_changes_the_scores_and_the_model_card_is_shown(visit: Any) -> None:
    page = visit()
    page.get_by_label("Search for").fill("red")
    page.get_by_label("Search for").press("Enter")
    said(page, "24 nearest")
    plain = scores(page)
    page.get_by_label("Task").click()
    options = page.get_by_role("option").all_inner_texts()
    assert [text.split(":")[0].strip(" ✓\n") for text in options] == ["model default", *PRESETS]
    page.get_by_role("option", name="classification").click()
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_function(
        "first => document.querySelector('#results .score').innerText !== first", arg=f"{plain[0]:.3f}"
    )
    page.get_by_role("button", name="The model").click()
    card = page.locator("dl.model")
    expect(card).to_contain_text("compact")
    assert "fingerprint" in card.inner_text() and "num_layers" in card.inner_text()
    keep(page, "wide-card")


def test_the_keyboard_goes_from_the_text_through_the_form_to_the_results(visit: Any) -> None:
    page, order = visit(), ["text", "go", "clear", "image", "task", "where", "number", "results"]
    for place in ("#image button", "#task input"):  # the page loads these after the results
        page.wait_for_selector(place)
    seen = []
    for _ in range(24):
        seen.append(
            page.evaluate("ids => document.activeElement.closest(ids)?.id", ",".join(f"#{one}" for one in order))
        )
        page.keyboard.press("Tab")
    assert list(dict.fromkeys(filter(None, seen))) == order
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.closest('#text') !== null")


CONTRAST = """(element) => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (one) => numbers(getComputedStyle(one).backgroundColor);
  let behind = element;
  while (behind.parentElement && (ground(behind)[3] ?? 1) < 1) behind = behind.parentElement;
  const pair = [light(numbers(getComputedStyle(element).color)), light(ground(behind))];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""  # contrast of a text with its background as defined by WCAG 2, which requires 4.5


def test_recent_searches_can_be_repeated_and_the_form_cleared(visit: Any, photos: Path) -> None:
    page = visit()
    for words in ("red", "<b>blue</b>", "red"):
        page.get_by_label("Search for").fill(words)
        page.get_by_label("Search for").press("Enter")
        expect(page.locator("#recent button").first).to_have_text(words)
    assert page.locator("#recent button").all_inner_texts() == ["red", "<b>blue</b>"]
    said(page, "24 nearest")
    red = scores(page)
    page.locator("#recent button").nth(1).click()
    expect(page.get_by_label("Search for")).to_have_value("<b>blue</b>")
    expect(page.locator("#recent button").first).to_have_text("<b>blue</b>")
    assert scores(page) != red
    drop(page, photos / "green_01.png")
    page.wait_for_selector("#image img")
    page.get_by_label("Filter").fill("path LIKE '%red%'")
    page.get_by_role("button", name="Clear", exact=True).click()
    said(page, "42 rows in this store")
    assert page.get_by_label("Search for").input_value() == page.get_by_label("Filter").input_value() == ""
    assert page.locator("#image img").count() == 0 and page.locator("#recent button").count() == 2


def test_a_result_links_to_its_file_and_to_no_other(visit: Any, address: str, photos: Path) -> None:
    page = visit()
    page.get_by_role("button", name="blue_10.png: show details").click()
    link = page.locator("#detail .file")
    expect(link).to_have_text("Open the file")
    with urllib.request.urlopen(address + link.get_attribute("href")) as answer:
        assert answer.headers["Content-Type"] == "image/png" and answer.read() == (photos / "blue_10.png").read_bytes()
    page.get_by_role("button", name="note.txt").first.click()
    expect(page.locator("#detail h2")).to_have_text("note.txt")
    assert page.locator("#detail .file").count() == 0
    for key in ("/etc/hostname", "../note.txt", "note.txt", ""):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}vlm2vec/original?key={urllib.parse.quote(key)}")
        assert refused.value.code == 404
        refused.value.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_screen_with_enough_contrast(visit: Any, width: int, scheme: str) -> None:
    page = visit(width, 760, scheme)
    page.get_by_label("Filter").fill("path LIKE '%note%' OR path LIKE '%red%'")
    page.get_by_label("Search for").fill("red")
    page.get_by_label("Search for").press("Enter")
    said(page, "11 nearest")
    page.get_by_role("button", name="note.txt").first.click()
    page.wait_for_selector("#detail .detail")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for place in (".name", ".score", ".status", ".similar", ".head p", ".detail dt", ".detail dd", "#go", "label span"):
        assert page.locator(place).first.evaluate(CONTRAST) >= 4.5, place
    keep(page, f"{width}-{scheme}")


def test_a_file_name_with_markup_is_shown_as_text(visit: Any) -> None:
    page = visit()
    assert HOSTILE in names(page)
    page.locator("#results .open").first.click()
    expect(page.locator("#detail h2")).to_have_text(HOSTILE)


def test_the_page_binds_to_loopback_and_serves_no_files(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    with (
        pytest.raises(urllib.error.HTTPError) as refused,
        urllib.request.urlopen(f"{address}gradio_api/file=/etc/hostname"),
    ):
        pass
    assert refused.value.code in (403, 404)
    refused.value.close()
    with urllib.request.urlopen(f"{address}config") as config:
        assert '"analytics_enabled":false' in config.read().decode().replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--store", "{folder}/none.lance"], "no such store; make it with: vlm2vec index"),
        (["--store", "{folder}/photos.lance"], "the page needs: pip install 'vlm2vec[ui]'"),
    ],
)
def test_an_error_is_one_line(
    address: str, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if Gradio were not installed
    given = [argument.format(folder=photos.parent) for argument in arguments]
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, ["ui", *given], catch_exceptions=False)
    assert part in str(error.value) and "\n" not in str(error.value)
