"""Verbs on a store of vectors: index, search, classify, duplicates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm2vec.cli.options import DEFAULT_MODEL, ModelArgument, OptionsOption, PickleOption, model_and_source, settings_of
from vlm2vec.errors import UserError
from vlm2vec.progress import progress_bar, say

if TYPE_CHECKING:
    from vlm2vec.retrieval.vector_store import Hit

StoreUri = Annotated[str, typer.Option("--store", help="photos.lance, or qdrant://host:port/collection.")]
WhereOption = Annotated[
    str | None,
    typer.Option("--where", help="Only rows of this SQL condition, such as \"width > 600 AND kind='page'\"."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Where the store's model lies now, if it is no longer where it was.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Write a page of the pictures to this file.")]


def index(
    first: ModelArgument = None,
    second: Annotated[
        Path | None,
        typer.Argument(metavar="INPUT", help="A folder; or a JSONL, CSV, parquet, text, PDF, zip or tar file."),
    ] = None,
    *,
    store: StoreUri,
    instruction: Annotated[str | None, typer.Option(help="Of the documents; default: the model's own.")] = None,
    precision: Annotated[str, typer.Option(help="In which vectors are kept: float32 or float16.")] = "float32",
    keep_images: Annotated[
        bool, typer.Option("--keep-pictures", help="Keep small copies in the store, to show results without the files.")
    ] = False,
    index: Annotated[
        str | None, typer.Option("--index", help="exact, IVF_RQ, IVF_HNSW_SQ, IVF_PQ; default: by the number of rows.")
    ] = None,
    errors: Annotated[Path | None, typer.Option(help="List of unreadable inputs; default: beside the store.")] = None,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Bring a store up to date with a folder: encodes what is new or changed, removes what is gone."""
    from vlm2vec.jobs.indexing import index_source, write_errors
    from vlm2vec.jobs.sources import open_source
    from vlm2vec.jobs.stores import facts_of, only_writer
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.retrieval.open import open_store

    model, source = model_and_source(first, second)
    inputs = open_source(source)
    total = inputs.count()
    settings: dict[str, Any] = settings_of(option, allow_pickle)
    embedder = Embedder.from_pretrained(model, **settings)
    facts = facts_of(embedder, model, options=settings, instruction=instruction, precision=precision)
    opened = open_store(store, create=facts)
    with only_writer(opened), progress_bar(f"indexing {source}", total) as advance:
        report = index_source(embedder, inputs, opened, keep_images=keep_images, index=index, progress=advance)
    say(
        f"{report.num_new} new, {report.num_changed} changed, {report.num_same} as they were, "
        f"{report.num_removed} removed; {report.num_encoded} encoded"
    )
    place = errors or _errors_file(store)
    write_errors(report, place)
    if report.errors:
        say(f"{len(report.errors)} could not be read, listed in {place}; the first: {report.errors[0][1]}")
    say(f"Store: {store}, {opened.count()} rows, search is {report.index.kind} ({report.index.reason})")
    say(f'Next: vlm2vec search "a dog on the beach" --store {store}')
    opened.close()


def search(
    text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    store: StoreUri = "",
    image: Annotated[Path | None, typer.Option(help="A picture to look for; with a text: the two together.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="The query's task: retrieval, classification, vqa, grounding, or a sentence.")
    ] = None,
    where: WhereOption = None,
    k: Annotated[int, typer.Option("-k", "--top-k", min=1, help="How many results.")] = 10,
    as_json: JsonOption = False,
    html: HtmlOption = None,
    model: ModelOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Search a store by text, by image, or by both."""
    from vlm2vec.jobs.searching import Query, Searcher, with_images
    from vlm2vec.jobs.stores import load_model_of
    from vlm2vec.media.images import ImageRef

    query = Query(text, ImageRef(path=str(image)) if image else None, instruction)
    query.as_input()  # an empty query is refused before a model is loaded
    opened = _open(store)
    hits = Searcher(load_model_of(opened, model, _consent(allow_pickle)), opened).search(query, k, where)
    if html:
        from vlm2vec.jobs.sheet import write_sheet

        write_sheet(html, str(query), [("", with_images(opened, hits))], query.image)
    _print_hits(hits, as_json)
    if html and not as_json:
        say(f"Page: {html}")
    opened.close()


def classify(
    source: Annotated[str, typer.Argument(help="A folder or file as for index, or a store.")],
    labels: Annotated[str, typer.Option(help="Names, with commas between.")],
    model: Annotated[str | None, typer.Option(help=f"Default: {DEFAULT_MODEL}, or the store's own.")] = None,
    template: Annotated[str, typer.Option(help="A sentence for the labels, {} being the name.")] = "{}",
    instruction: Annotated[
        str | None, typer.Option(help="Of a folder's inputs: a task by name, or a sentence.")
    ] = "classification",
    where: WhereOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON lines to this file.")] = None,
    as_json: JsonOption = False,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Give every image the label that is nearest: no training."""
    from vlm2vec.jobs.classifying import Labels, classify_source, classify_store
    from vlm2vec.jobs.sources import open_source
    from vlm2vec.jobs.stores import load_model_of
    from vlm2vec.models.embedder import Embedder

    if source.startswith("qdrant://") or source.rstrip("/").endswith(".lance"):
        opened = _open(source)
        embedder = load_model_of(opened, model, _consent(allow_pickle))
        verdicts = list(classify_store(opened, Labels(embedder, labels.split(","), template), where))
        opened.close()
    else:
        if where:
            raise UserError("--where selects rows of a store; a folder has none: index it first")
        inputs = open_source(source)
        settings: dict[str, Any] = settings_of(option, allow_pickle)
        embedder = Embedder.from_pretrained(model or DEFAULT_MODEL, **settings)
        names = Labels(embedder, labels.split(","), template)
        with progress_bar(f"classifying {source}", inputs.count()) as advance:
            verdicts = list(classify_source(embedder, inputs, names, instruction, advance))
    rows = [{name: value for name, value in vars(one).items() if value is not None} for one in verdicts]
    if output:
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if as_json:
        say(json.dumps(rows, indent=2))
        return
    _print_verdicts(verdicts, detailed=output is None)
    if output:
        say(f"Labels: {output}")


def duplicates(
    store: StoreUri,
    threshold: Annotated[float, typer.Option(help="Two rows are near from this cosine on.")] = 0.95,
    where: WhereOption = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Find near-duplicates in a store; nothing is removed."""
    from vlm2vec.jobs.duplicates import find_duplicates
    from vlm2vec.jobs.searching import with_images

    opened = _open(store)
    with progress_bar("comparing", opened.count(where)) as advance:
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
                f"{'' if number == 0 else '  '}{hit.score:.3f} {hit.key}" for number, hit in enumerate(group.hits)
            )
        )
    extra = sum(len(group.hits) - 1 for group in groups)
    say(f"{len(groups)} groups; {extra} rows are near one that comes before them (cosine {threshold} or more)")
    if html:
        say(f"Page: {html}")


def _open(store: str) -> Any:
    from vlm2vec.retrieval.open import open_store

    if not store:
        raise UserError("--store is missing: photos.lance, or qdrant://host:port/collection")
    return open_store(store)


def _consent(allow_pickle: bool) -> dict[str, object]:
    return {"allow_pickle": True} if allow_pickle else {}


def _errors_file(store: str) -> Path:
    """Beside a local store; for one of a server, in the working folder."""
    if "://" in store:
        return Path(f"{store.rstrip('/').rpartition('/')[2]}.errors.jsonl")
    return Path(f"{store.rstrip('/')}.errors.jsonl")


def _plain(hit: Hit) -> dict[str, Any]:
    return {"key": hit.key, "score": round(hit.score, 6), "metadata": hit.metadata}


def _print_hits(hits: list[Hit], as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        say(json.dumps([_plain(hit) for hit in hits], indent=2))
        return
    table = Table(box=None)
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    table.add_column("what", overflow="fold")
    for number, hit in enumerate(hits, start=1):
        table.add_row(str(number), f"{hit.score:.3f}", hit.key)
    say(table)


def _print_verdicts(verdicts: list[Any], detailed: bool) -> None:
    from collections import Counter

    from rich.table import Table

    if detailed:
        table = Table(box=None)
        for heading in ("label", "score", "margin", "what"):
            table.add_column(heading, justify="right" if heading in ("score", "margin") else "left", overflow="fold")
        for one in verdicts:
            table.add_row(one.label or "unreadable", f"{one.score:.3f}", f"{one.margin:.3f}", one.key)
        say(table)
    counts = Counter(one.label or "unreadable" for one in verdicts)
    say(", ".join(f"{label}: {count}" for label, count in counts.most_common()))
