"""Commands that answer from a vector store: search, classify, duplicates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm2vec.cli.options import (
    DEFAULT_MODEL,
    OptionsOption,
    PickleOption,
    RerankCosineOption,
    StoreUri,
    note_model,
    open_vector_store,
    rerank_cosine_of,
    settings_of,
)
from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.progress import progress_bar, say

if TYPE_CHECKING:
    from vlm2vec.jobs.searching import Query, QueryEncoder
    from vlm2vec.retrieval.vector_store import Hit, VectorStore

WhereOption = Annotated[
    str | None,
    typer.Option("--where", help="Only rows that match this SQL condition, such as \"width > 600 AND kind='page'\"."),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Path of the store's model, if it was moved.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", help="Write the results with their images to this HTML file.")
]

NO_ROWS = "No rows match"


def search(
    text: Annotated[str | None, typer.Argument(help="Text to search for.")] = None,
    store: StoreUri = "",
    image: Annotated[Path | None, typer.Option(help="Image to search for; may be combined with a text.")] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help="Instruction of the query: retrieval, classification, vqa, grounding, or a sentence."),
    ] = None,
    where: WhereOption = None,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="Number of results.")] = 10,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    model: ModelOption = None,
    server: Annotated[
        str | None,
        typer.Option(help="Address of a running vlm2vec serve --store, in place of --store: no model is loaded here."),
    ] = None,
    reranker: Annotated[
        str | None, typer.Option("--rerank", help="A VLM that reads the query with each of the nearest rows.")
    ] = None,
    num_reranked: Annotated[int, typer.Option("--rerank-top", min=1, help="Number of rows that it reads.")] = 50,
    rerank_cosine: RerankCosineOption = 0.0,
    allow_pickle: PickleOption = False,
) -> None:
    """Search a vector store by text, by image, or by both.

    Example: vlm2vec search "a dog on the beach" --store photos.lance
    """
    from vlm2vec.jobs.searching import Query
    from vlm2vec.media.images import ImageRef

    query = Query(text, ImageRef(path=str(image)) if image else None, instruction)
    query.as_input()  # an empty query is refused before a model is loaded
    cosine_weight = rerank_cosine_of(rerank_cosine, reranker)
    if server:
        from vlm2vec.jobs.remote_search import search_server

        for name, value in {"--store": store, "--model": model, "--html": html, "--rerank": reranker}.items():
            if value:
                raise UserError(f"{name} cannot be combined with --server: the server has its own store and model")
        _print_hits(search_server(server, query, k, where), as_json)
        return
    from vlm2vec.jobs.searching import Searcher, with_images

    opened = open_vector_store(store)
    searcher = Searcher(_query_encoder(opened, query, model, allow_pickle), opened)
    hits = searcher.search(query, max(k, num_reranked) if reranker else k, where)
    if reranker:
        hits = _reranked(reranker, query, hits, k, cosine_weight, allow_pickle)
    if html:
        from vlm2vec.jobs.sheet import write_sheet

        write_sheet(html, str(query), [("", with_images(opened, hits))], query.image)
    _print_hits(hits, as_json)
    if not as_json:
        if html:
            say(f"Page: {html}")
        note_model(opened.facts.model)
    opened.close()


def classify(
    source: Annotated[str, typer.Argument(help="A folder or file as for index, or a vector store.")],
    labels: Annotated[str, typer.Option(help="Labels, separated by commas.")],
    model: Annotated[str | None, typer.Option(help=f"Default: {DEFAULT_MODEL}, or the store's own.")] = None,
    template: Annotated[str, typer.Option(help="Sentence for each label, with {} for the label.")] = "{}",
    instruction: Annotated[
        str | None, typer.Option(help="Instruction of a folder's inputs: a task by name, or a sentence.")
    ] = "classification",
    where: WhereOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines to this file.")] = None,
    as_json: JsonOption = False,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Label each image with the nearest of some labels, without training (zero-shot classification).

    Example: vlm2vec classify photos/ --labels cat,dog --template "a photo of a {}"
    """
    from vlm2vec.jobs.classifying import Labels, classify_source, classify_store
    from vlm2vec.jobs.sources import open_source
    from vlm2vec.jobs.stores import load_model_of
    from vlm2vec.models.embedder import Embedder

    if source.startswith("qdrant://") or source.rstrip("/").endswith(".lance"):
        opened = open_vector_store(source)
        embedder = load_model_of(opened, model, _consent(allow_pickle))
        verdicts = list(classify_store(opened, Labels(embedder, labels.split(","), template), where))
        opened.close()
    else:
        if where:
            raise UserError(f"--where selects rows of a vector store and {source} is none; index it first")
        inputs = open_source(source)
        settings: dict[str, Any] = settings_of(option, allow_pickle)
        embedder = Embedder.from_pretrained(model or DEFAULT_MODEL, **settings)
        names = Labels(embedder, labels.split(","), template)
        with progress_bar(f"classifying {source}", inputs.expected()) as advance:
            verdicts = list(classify_source(embedder, inputs, names, instruction, advance))
    rows = [{name: value for name, value in vars(one).items() if value is not None} for one in verdicts]
    if output:
        write_text(output, "".join(json.dumps(row) + "\n" for row in rows))
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    _print_verdicts(verdicts, detailed=output is None)
    if output:
        say(f"Labels: {output}")


def duplicates(
    store: StoreUri,
    threshold: Annotated[float, typer.Option(help="Cosine from which two rows are duplicates.")] = 0.95,
    where: WhereOption = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Find near-duplicates in a vector store; nothing is removed.

    Example: vlm2vec duplicates --store photos.lance --threshold 0.95
    """
    from vlm2vec.jobs.duplicates import find_duplicates
    from vlm2vec.jobs.searching import with_images

    opened = open_vector_store(store)
    count = opened.count(where)
    with progress_bar("comparing", count) as advance:
        groups = find_duplicates(opened, threshold, where, advance)
    if html:
        from vlm2vec.jobs.sheet import write_sheet

        sections = [(f"{len(group.hits)} alike", with_images(opened, group.hits)) for group in groups]
        write_sheet(html, f"Near-duplicates from cosine {threshold}", sections)
    opened.close()
    if as_json:
        say(json.dumps([[_plain(hit) for hit in group.hits] for group in groups], indent=2))
        return
    for group in groups:
        say(
            "\n".join(
                f"{'' if number == 0 else '  '}{hit.score:.3f} {hit.key}{_gone(hit)}"
                for number, hit in enumerate(group.hits)
            )
        )
    extra = sum(len(group.hits) - 1 for group in groups)
    if not count:
        say(NO_ROWS)
        return
    say(f"{len(groups)} groups; {extra} rows are near one that comes before them (cosine {threshold} or more)")
    if html:
        say(f"Page: {html}")


def _query_encoder(store: VectorStore, query: Query, model: str | None, allow_pickle: bool) -> QueryEncoder:
    """The store's model; for a text, its text side alone where this machine has it, which loads in a fraction."""
    from vlm2vec.jobs.text_queries import keep_text_side, text_side_of

    if query.image is None and model is None and (text_side := text_side_of(store.facts)):
        return text_side
    from vlm2vec.jobs.stores import load_model_of

    embedder = load_model_of(store, model, _consent(allow_pickle))
    keep_text_side(embedder, store.facts)
    return embedder


def _reranked(model: str, query: Query, hits: list[Hit], k: int, cosine_weight: float, allow_pickle: bool) -> list[Hit]:
    from vlm2vec.jobs.reranking import rerank_hits
    from vlm2vec.models.reranking.reranker import Reranker

    reranker = Reranker.from_pretrained(model, **_consent(allow_pickle))
    best, skipped = rerank_hits(reranker, query, hits, k, cosine_weight)
    for reason in skipped:
        sys.stderr.write(f"left out: {reason}\n")
    return best


def _consent(allow_pickle: bool) -> dict[str, Any]:
    return {"allow_pickle": True} if allow_pickle else {}


def _plain(hit: Hit) -> dict[str, Any]:
    from vlm2vec.jobs.searching import is_missing

    missing = {"missing": True} if is_missing(hit.metadata) else {}
    return {"key": hit.key, "score": round(hit.score, 6), **missing, "metadata": hit.metadata}


def _gone(hit: Hit) -> str:
    from vlm2vec.jobs.searching import is_missing

    return " (file not found)" if is_missing(hit.metadata) else ""


def _print_hits(hits: list[Hit], as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    if as_json:
        say(json.dumps([_plain(hit) for hit in hits], indent=2))
        return
    if not hits:
        say(NO_ROWS)
        return
    table = Table(box=None)
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("what", overflow="fold")
    for number, hit in enumerate(hits, start=1):
        table.add_row(str(number), f"{hit.score:.3f}", escape(hit.key + _gone(hit)))
    say(table)


def _print_verdicts(verdicts: list[Any], detailed: bool) -> None:
    from collections import Counter

    from rich.markup import escape
    from rich.table import Table

    if not verdicts:
        say(NO_ROWS)
        return
    if detailed:
        table = Table(box=None)
        for heading in ("label", "score", "margin", "what"):
            table.add_column(heading, justify="right" if heading in ("score", "margin") else "left", overflow="fold")
        for one in verdicts:
            named = (escape(one.label or "unreadable"), f"{one.score:.3f}", f"{one.margin:.3f}", escape(one.key))
            table.add_row(*named)
        say(table)
    counts = Counter(one.label or "unreadable" for one in verdicts)
    say(", ".join(f"{label}: {count}" for label, count in counts.most_common()))
