"""The search page in the browser, built with Gradio: a form and results. The page loads no external fonts or scripts,
sends no analytics, and creates no public link.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from vlm2vec.errors import UserError
from vlm2vec.jobs.searching import Query, Searcher
from vlm2vec.media.images import ImageRef
from vlm2vec.serving.ui_parts import Answer, SearchPage, fields_line, model_card, tasks

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


def build_page(searcher: Searcher, title: str, note: str = "") -> gr.Blocks:
    """Build the search page of a store.

    Args:
        searcher: The store and its model.
        title: Name of the store.
        note: Line beside the title.
    """
    answers = SearchPage(searcher)
    script = (TEMPLATES / "ui.js").read_text()
    with gr.Blocks(
        title=f"{title} · vlm2vec", analytics_enabled=False, delete_cache=(FILE_LIFE // 6, FILE_LIFE)
    ) as page:
        gr.HTML(_head(title, note), apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=290):
                asked, go = _form(answers)
                with gr.Accordion("The model", open=False):
                    gr.HTML(model_card(searcher.store), apply_default_css=False)
            with gr.Column(scale=3, min_width=300):
                begin = answers.first(RESULTS)
                status = gr.HTML(begin.status, elem_id="status", apply_default_css=False)
                detail = gr.HTML("", elem_id="detail", js_on_load=script, apply_default_css=False)
                results = gr.HTML(begin.results, elem_id="results", js_on_load=script, apply_default_css=False)
        shown = [status, detail, results]
        text, image, _, where, number = asked

        def search(words: str, file: str | None, task: str | None, where: str, number: float) -> list[Any]:
            image = ImageRef(path=file, origin="the uploaded image") if file else None
            return _changes(answers.search(Query(words, image, task), int(number), where.strip()))

        def act(event: gr.EventData, where: str, number: float) -> list[Any]:
            if event.act == "open":
                return _changes(answers.detail(event.key))
            return _changes(answers.similar(event.key, int(number), where.strip()))

        gr.on([go.click, text.submit, where.submit], search, asked, shown, **ONE_AT_A_TIME, **PRIVATE)
        image.upload(search, asked, shown, **ONE_AT_A_TIME, **PRIVATE)
        gr.on([detail.click, results.click], act, [where, number], shown, **PRIVATE)
    return page


def launch_page(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serve the page from threads of this process and return its address.

    Args:
        page: A page from `build_page`.
        host: Address to bind to.
        port: TCP port; None: the first free port from 7860 on.

    Raises:
        UserError: if the port is in use.
    """
    try:
        _, address, _ = page.launch(
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
    return str(address)


def _form(answers: SearchPage) -> tuple[list[Any], gr.Button]:
    """The form fields in keyboard order, and the search button."""
    text = gr.Textbox(
        label="Search for", placeholder="a dog on the beach", lines=1, max_lines=1, autofocus=True, elem_id="text"
    )
    go = gr.Button("Search", variant="primary", elem_id="go")
    image = gr.Image(
        label="Image (drop, paste or choose)", type="filepath", sources=["upload", "clipboard"], height=190,
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
    return [text, image, task, where, number], go


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
