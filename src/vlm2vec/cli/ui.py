"""The verb that opens a search page: ui."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm2vec.cli.options import DEFAULT_MODEL, PickleOption
from vlm2vec.errors import UserError
from vlm2vec.progress import progress_bar, say


def ui(
    store: Annotated[
        str | None, typer.Option(help="photos.lance, or qdrant://…; without it, a small demo of drawn pictures.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the store's model lies now; for the demo: any model, in place of the default."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="TCP port; default: 7860, or the next that is free.")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser.")] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Search a store in the browser: by text, by image, or by both."""
    from vlm2vec.jobs.searching import Searcher
    from vlm2vec.jobs.stores import load_model_of
    from vlm2vec.retrieval.open import open_store

    opened = open_store(store) if store else None
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        from vlm2vec.serving.ui import build_page, launch_page
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; the page needs: pip install 'vlm2vec[ui]'") from error
    consent = {"allow_pickle": True} if allow_pickle else {}
    if opened:
        searcher = Searcher(load_model_of(opened, model, consent), opened)
        title, note = Path(opened.uri).name, f"{opened.count():,} rows · {Path(opened.facts.model).name}"
    else:
        searcher, note = _demo(model or DEFAULT_MODEL, consent)
        title = "Demo: drawn pictures"
    page = build_page(searcher, title, note)
    address = launch_page(page, host, port)
    say(f"Page: {address} (Ctrl-C ends it)")
    if host not in ("127.0.0.1", "localhost", "::1"):
        say("Whoever reaches this address can search the store and see its pictures: no key is asked for")
    if browser:
        typer.launch(address)
    page.block_thread()


def _demo(model: str, consent: dict[str, Any]) -> tuple[Any, str]:
    """The demo's store with any model, and what the page says of them."""
    from vlm2vec.jobs.demo_store import demo_store, num_images
    from vlm2vec.jobs.searching import Searcher
    from vlm2vec.models.embedder import Embedder

    embedder = Embedder.from_pretrained(model, **consent)
    with progress_bar("demo pictures", num_images()) as advance:
        opened = demo_store(embedder, model, progress=advance)
    return Searcher(embedder, opened), f"{opened.count()} pictures · {model}"
