"""The command `ui`: a search page in the browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm2vec.cli.options import DEFAULT_MODEL, PickleOption, RerankCosineOption, about_model, rerank_cosine_of
from vlm2vec.errors import UserError
from vlm2vec.progress import progress_bar, say


def ui(
    store: Annotated[
        str | None,
        typer.Option(help="Vector store, such as photos.lance or qdrant://…; without it: a demo with drawn images."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Current place of the store's model, if it moved; for the demo: any model."),
    ] = None,
    rerank: Annotated[
        str | None, typer.Option(help="A VLM that reads the query with each of the nearest rows and orders them.")
    ] = None,
    rerank_cosine: RerankCosineOption = 0.0,
    host: Annotated[str, typer.Option(help="Address to bind to; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="TCP port; default: the first free port from 7860 on.")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser.")] = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Search a vector store in the browser by text, by image, or by both.

    Example: vlm2vec ui --store photos.lance --browser
    """
    from vlm2vec.jobs.searching import Searcher
    from vlm2vec.jobs.stores import load_model_of
    from vlm2vec.retrieval.open import open_store

    cosine_weight = rerank_cosine_of(rerank_cosine, rerank)
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
        title = "Demo: drawn images"
    note = " · ".join(filter(None, (note, about_model(searcher.store.facts.model))))
    page = build_page(searcher, title, note, _ranker(rerank, consent), cosine_weight)
    address = launch_page(page, searcher, host, port)
    say(f"Page: {address} (Ctrl-C stops it)")
    if host not in ("127.0.0.1", "localhost", "::1"):
        say("Anyone who can reach this address can search the store and see its images; no key is required")
    if browser:
        typer.launch(address)
    page.block_thread()


def _ranker(model: str | None, consent: dict[str, Any]) -> Any:
    """The reranker of the page, if there is one."""
    from vlm2vec.models.reranking.reranker import Reranker

    return Reranker.from_pretrained(model, **consent) if model else None


def _demo(model: str, consent: dict[str, Any]) -> tuple[Any, str]:
    """The demo store for a model, and the note for the page."""
    from vlm2vec.jobs.demo_store import demo_store, num_images
    from vlm2vec.jobs.searching import Searcher
    from vlm2vec.models.embedder import Embedder

    embedder = Embedder.from_pretrained(model, **consent)
    with progress_bar("demo images", num_images()) as advance:
        opened = demo_store(embedder, model, progress=advance)
    return Searcher(embedder, opened), f"{opened.count()} images · {model}"
