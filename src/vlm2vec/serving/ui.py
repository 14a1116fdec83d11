"""The search page in the browser, built with Gradio: a form and results. The page loads no external fonts or scripts,
sends no analytics, and creates no public link.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from vlm2vec.errors import UserError
from vlm2vec.jobs.searching import Query, Searcher
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.vector_store import VectorStore
from vlm2vec.serving.ui_parts import (
    NUM_RERANKED,
    ORIGINAL,
    Answer,
    SearchPage,
    fields_line,
    model_card,
    original_image,
    recent_list,
    tasks,
    with_recent,
)

if TYPE_CHECKING:
    from vlm2vec.models.reranking.reranker import Reranker

TEMPLATES = Path(__file__).with_name("templates")
RESULTS = 24
MOST_RESULTS = 96
FILE_LIFE = 3600  # seconds after which uploaded images are deleted
FONT = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
# "/" focuses the text field, Escape closes the detail view.
KEYS = """<script>document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, [contenteditable]");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    document.querySelector("#text textarea, #text input").focus();
  }
  if (event.key === "Escape" && !typing) document.querySelector("#detail .close")?.click();
});</script>"""


def build_page(
    searcher: Searcher, title: str, note: str = "", ranker: Reranker | None = None, cosine_weight: float = 0.0
) -> gr.Blocks:
    """Build the search page of a store.

    Args:
        searcher: The store and its model.
        title: Name of the store.
        note: Line next to the title.
        ranker: Orders the nearest rows of a search, unless the visitor switches it off.
        cosine_weight: The cosine times this number is added to the reranker's log-odds.
    """
    answers = SearchPage(searcher, ranker, cosine_weight)
    script = (TEMPLATES / "ui.js").read_text()
    with gr.Blocks(
        title=f"{title} · vlm2vec", analytics_enabled=False, delete_cache=(FILE_LIFE // 6, FILE_LIFE)
    ) as page:
        gr.HTML(_head(title, note), apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=290):
                asked, go, clear = _form(answers)
                with gr.Accordion("The model", open=False):
                    gr.HTML(model_card(searcher.store), apply_default_css=False)
            with gr.Column(scale=4, min_width=300):
                begin = answers.first(RESULTS)
                recent = gr.HTML("", elem_id="recent", js_on_load=script, apply_default_css=False)
                status = gr.HTML(begin.status, elem_id="status", apply_default_css=False)
                detail = gr.HTML("", elem_id="detail", js_on_load=script, apply_default_css=False)
                results = gr.HTML(begin.results, elem_id="results", js_on_load=script, apply_default_css=False)
        _connect(answers, asked, (go, clear), recent, [status, detail, results])
    return page


def _connect(
    answers: SearchPage, asked: list[Any], buttons: tuple[gr.Button, gr.Button], recent: gr.HTML, shown: list[Any]
) -> None:
    """Connect the events of the page with its answers."""
    (text, image, _, where, number, _), (go, clear) = asked, buttons
    _, detail, results = shown
    past = gr.State([])  # texts of this visit, newest first

    def search(
        words: str, file: str | None, task: str | None, where: str, number: float, rerank: bool, past: list[str]
    ) -> list[Any]:
        image = ImageRef(path=file, origin="the uploaded image") if file else None
        kept = with_recent(past, words)
        answer = answers.search(Query(words, image, task), int(number), where.strip(), rerank)
        return [*_changes(answer), recent_list(kept), kept]

    def again(
        event: gr.EventData, task: str | None, where: str, number: float, rerank: bool, past: list[str]
    ) -> list[Any]:
        return [event.key, None, *search(event.key, None, task, where, number, rerank, past)]

    def act(event: gr.EventData, where: str, number: float) -> list[Any]:
        if event.act == "open":
            return _changes(answers.detail(event.key))
        return _changes(answers.similar(event.key, int(number), where.strip()))

    def empty() -> list[Any]:
        return ["", None, "", "", RESULTS, answers.ranker is not None, *_changes(answers.first(RESULTS))]

    gr.on(
        [go.click, text.submit, where.submit, image.upload],
        search, [*asked, past], [*shown, recent, past], **ONE_AT_A_TIME, **PRIVATE,
    )  # fmt: skip
    recent.click(again, [*asked[2:], past], [text, image, *shown, recent, past], **ONE_AT_A_TIME, **PRIVATE)
    clear.click(empty, [], [*asked, *shown], **PRIVATE)
    gr.on([detail.click, results.click], act, [where, number], shown, **PRIVATE)


def launch_page(page: gr.Blocks, searcher: Searcher, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serve the page from threads of this process and return its address.

    Args:
        page: A page from `build_page`.
        searcher: The store of the page, whose images `ORIGINAL` serves in their own format.
        host: Address to bind to.
        port: TCP port; None: the first free port from 7860 on.

    Raises:
        UserError: if the port is in use.
    """
    try:
        app, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size="32mb",
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=_theme(),
            css=(TEMPLATES / "ui.css").read_text(),
            head=KEYS,
        )
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port or 7860}: cannot bind to this address ({error}); choose another"
        ) from error
    app.router.routes.insert(0, Route(f"/{ORIGINAL}", original_of(searcher.store)))
    return str(address)


def original_of(store: VectorStore) -> Callable[[Request], Response]:
    """An endpoint that serves the image file of a row, `?key=…`: no other file, and nothing that is not an image."""

    def original(request: Request) -> Response:
        found = original_image(store, request.query_params.get("key", ""))
        if found is None:
            return PlainTextResponse("this row has no image", 404)
        data, media_type = found
        return Response(data, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})

    return original


def _form(answers: SearchPage) -> tuple[list[Any], gr.Button, gr.Button]:
    """The form fields in keyboard order, and the buttons to search and to clear."""
    text = gr.Textbox(
        label="Search for", placeholder="a dog on the beach", lines=1, max_lines=1, autofocus=True, elem_id="text"
    )
    with gr.Row(elem_id="buttons"):
        go = gr.Button("Search", variant="primary", elem_id="go", min_width=120)
        clear = gr.Button("Clear", elem_id="clear", min_width=80)
    image = gr.Image(
        label="Image (drop, paste or choose)", type="filepath", sources=["upload", "clipboard"], height=112,
        elem_id="image", buttons=[],
    )  # fmt: skip
    task = gr.Dropdown(
        tasks(), value="", label="Task", info="Or your own instruction", allow_custom_value=True, elem_id="task"
    )
    where = gr.Textbox(
        label="Filter", placeholder="width > 600 AND path LIKE '%beach%'", lines=1, max_lines=1, elem_id="where",
        info=f"Fields: {fields_line(answers.store)}",
    )  # fmt: skip
    number = gr.Slider(4, MOST_RESULTS, RESULTS, step=4, label="Results", elem_id="number")
    added = f"; {answers.cosine_weight:g} times the cosine is added" if answers.cosine_weight else ""
    rerank = gr.Checkbox(
        answers.ranker is not None, label=f"Rerank the nearest {NUM_RERANKED}", elem_id="rerank",
        info=f"A model reads the query with each{added}", visible=answers.ranker is not None,
    )  # fmt: skip
    return [text, image, task, where, number, rerank], go, clear


def _theme() -> gr.themes.Base:
    """System fonts, and colors with enough contrast in light and dark mode."""
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=["ui-monospace", "monospace"]
    )
    soft: dict[str, str] = {}
    for name in ("body_text_color_subdued", "block_info_text_color", "input_placeholder_color"):
        soft |= {name: "*neutral_500", f"{name}_dark": "*neutral_400"}
    button = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    return theme.set(**soft, **button, **{f"{name}_dark": value for name, value in button.items()})


def _head(title: str, note: str) -> str:
    from html import escape

    return f'<div class="head"><h1>{escape(title)}</h1><p>{escape(note)}</p></div>'


def _changes(answer: Answer) -> list[Any]:
    """New values of the three parts; a part that is None stays unchanged."""
    return [gr.skip() if part is None else part for part in (answer.status, answer.detail, answer.results)]
