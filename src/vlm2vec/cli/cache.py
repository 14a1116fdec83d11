"""Commands on the embedding cache: ls, clean."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm2vec.cli.options import CacheOption, OldCacheOption, renamed, warn
from vlm2vec.progress import say


def cache_ls(cache: CacheOption = None) -> None:
    """List the cached embeddings: fingerprint, model, number of vectors, size, date of last use.

    Example: vlm2vec cache ls
    """
    from datetime import datetime

    from rich.table import Table

    from vlm2vec.retrieval.cache_folder import default_cache, list_cache

    root = cache or default_cache()
    table = Table(title=f"{root}")
    for heading in ("fingerprint", "model", "vectors", "MB", "last used", "precision"):
        table.add_column(heading, justify="right" if heading in ("vectors", "MB") else "left")
    for entry in list_cache(root):
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        size = f"{entry.num_bytes / 1e6:.1f}"
        precision = entry.about.get("precision", "?")
        table.add_row(entry.fingerprint, entry.model, str(entry.num_vectors), size, used, precision)
    say(table)


def cache_clean(
    fingerprints: Annotated[list[str] | None, typer.Argument(help="From `vlm2vec cache ls`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all cached embeddings.")] = False,
    cache: CacheOption = None,
) -> None:
    """Remove cached embeddings, and temporary files of killed processes.

    Example: vlm2vec cache clean --all
    """
    from vlm2vec.retrieval.cache_folder import clean_cache, default_cache, list_cache

    root = cache or default_cache()
    names = [entry.fingerprint for entry in list_cache(root)] if everything else fingerprints or []
    say(f"{root}: {clean_cache(root, names) / 1e6:.1f} MB freed")


def store_ls(cache: CacheOption = None, store: OldCacheOption = None) -> None:
    """Deprecated spelling of `vlm2vec cache ls`."""
    warn("vlm2vec store ls is deprecated; use vlm2vec cache ls")
    cache_ls(renamed(cache, store, "--cache", "--store"))


def store_clean(
    fingerprints: Annotated[list[str] | None, typer.Argument()] = None,
    everything: Annotated[bool, typer.Option("--all")] = False,
    cache: CacheOption = None,
    store: OldCacheOption = None,
) -> None:
    """Deprecated spelling of `vlm2vec cache clean`."""
    warn("vlm2vec store clean is deprecated; use vlm2vec cache clean")
    cache_clean(fingerprints, everything, renamed(cache, store, "--cache", "--store"))
