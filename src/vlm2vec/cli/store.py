"""Verbs on the vectors that evaluations keep."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm2vec.cli.options import StoreOption
from vlm2vec.progress import say


def store_ls(store: StoreOption = None) -> None:
    """List the kept vectors: fingerprint, model, how many, how large, when last used."""
    from datetime import datetime

    from rich.table import Table

    from vlm2vec.retrieval.embedding_cache import default_store, list_store

    root = store or default_store()
    table = Table(title=f"{root}")
    for heading in ("fingerprint", "model", "vectors", "MB", "last used", "precision"):
        table.add_column(heading, justify="right" if heading in ("vectors", "MB") else "left")
    for entry in list_store(root):
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        size = f"{entry.num_bytes / 1e6:.1f}"
        precision = entry.about.get("precision", "?")
        table.add_row(entry.fingerprint, entry.model, str(entry.num_vectors), size, used, precision)
    say(table)


def store_clean(
    fingerprints: Annotated[list[str] | None, typer.Argument(help="From `vlm2vec store ls`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all vectors.")] = False,
    store: StoreOption = None,
) -> None:
    """Remove kept vectors, and what killed processes left half-written."""
    from vlm2vec.retrieval.embedding_cache import clean_store, default_store, list_store

    root = store or default_store()
    names = [entry.fingerprint for entry in list_store(root)] if everything else fingerprints or []
    say(f"{root}: {clean_store(root, names) / 1e6:.1f} MB freed")
