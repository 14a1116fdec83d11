"""The search page in the browser: a form and results, by Gradio. Nothing leaves this machine: no fonts or scripts from
elsewhere, no counting of visits, no link to share.
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
FILE_LIFE = 3600  # seconds that an image given to the page is kept
FONT = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
# "/" goes to the text from anywhere, Escape closes a result in full.
KEYS = """<script>document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, [contenteditable]");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    document.querySelector("#text textarea, #text input").focus();
  }
  if (event.key === "Escape" && !typing) document.querySelector("#detail .close")?.click();
});</script>"""


def build_page(searcher: Searcher, title: str, note: str = "") -> gr.Blocks:
    """The page of a store.

    Args:
        searcher: The store and its model.
        title: Names the store.
        note: A line beside the title.
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
            image = ImageRef(path=file, origin="the picture that was given") if file else None
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
    """Serves the page from threads of this process; returns its address.

    Args:
        page: Of `build_page`.
        host: Address to listen at.
        port: None: 7860, or the next that is free.

    Raises:
        UserError: if the port is taken.
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
        raise UserError(f"--host {host} --port {port or 7860}: cannot listen there ({error})") from error
    return str(address)


def _form(answers: SearchPage) -> tuple[list[Any], gr.Button]:
    """What a visitor can set, in the order of the keyboard's focus."""
    text = gr.Textbox(
        label="Look for", placeholder="a dog on the beach", lines=1, max_lines=1, autofocus=True, elem_id="text"
    )
    go = gr.Button("Search", variant="primary", elem_id="go")
    image = gr.Image(
        label="Picture (drop, paste or choose)", type="filepath", sources=["upload", "clipboard"], height=190,
        elem_id="picture", buttons=[],
    )  # fmt: skip
    task = gr.Dropdown(
        tasks(), value="", label="Task", info="Or a sentence of your own", allow_custom_value=True, elem_id="task"
    )
    where = gr.Textbox(
        label="Filter", placeholder="width > 600 AND kind = 'picture'", lines=1, max_lines=1, elem_id="where",
        info=f"Fields: {fields_line(answers.store)}",
    )  # fmt: skip
    number = gr.Slider(4, MOST_RESULTS, RESULTS, step=4, label="Results", elem_id="number")
    return [text, image, task, where, number], go


def _theme() -> gr.themes.Base:
    """The machine's own fonts, and colours of which every pair is legible in the light and in the dark."""
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
    """Values of the three parts; a part without a new one stays."""
    return [gr.skip() if part is None else part for part in (answer.status, answer.detail, answer.results)]
