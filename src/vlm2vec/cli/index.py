"""Commands that change a vector store: index, load, forget, relocate."""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm2vec.cli.failures import resumable
from vlm2vec.cli.options import (
    AddressOption,
    EncodingOption,
    GpusOption,
    ModelArgument,
    OptionsOption,
    PickleOption,
    StoreArgument,
    StoreUri,
    WorkersOption,
    check_engine,
    model_and_source,
    note_model,
    open_vector_store,
    renamed,
    say_skipped,
    settings_of,
)
from vlm2vec.errors import UserError
from vlm2vec.media.text import ENCODING
from vlm2vec.progress import progress_bar, say

if TYPE_CHECKING:
    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.jobs.index_writer import IndexReport, OpenWriter
    from vlm2vec.jobs.sources import Source
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.retrieval.vector_store import VectorStore


def index(
    first: ModelArgument = None,
    second: Annotated[
        Path | None,
        typer.Argument(metavar="INPUT", help="A folder; or a JSONL, CSV, parquet, text, PDF, zip or tar file."),
    ] = None,
    *,
    store: StoreUri,
    instruction: Annotated[
        str | None, typer.Option(help="Instruction of the documents; default: the model's own.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Storage precision: float32 or float16.")] = "float32",
    keep_images: Annotated[
        bool, typer.Option("--keep-images", help="Keep thumbnails in the store, to show results without the files.")
    ] = False,
    keep_pictures: Annotated[bool, typer.Option("--keep-pictures", hidden=True)] = False,
    index: Annotated[
        str | None,
        typer.Option("--index", help="exact, IVF_RQ, IVF_HNSW_SQ or IVF_PQ; default: by the number of rows."),
    ] = None,
    errors: Annotated[
        Path | None, typer.Option(help="File for the list of unreadable inputs; default: beside the store.")
    ] = None,
    encoding: EncodingOption = ENCODING,
    engine: Annotated[str, typer.Option(help="local, or ray to read and encode on a Ray cluster.")] = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    address: AddressOption = None,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Bring a vector store up to date with a folder: encode new and changed inputs, remove the rows of deleted ones.

    Example: vlm2vec index photos/ --store photos.lance
    """
    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.jobs.records import SourceSettings
    from vlm2vec.jobs.sources import open_source
    from vlm2vec.jobs.stores import facts_of, only_writer
    from vlm2vec.jobs.text_queries import keep_text_side
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.retrieval.open import open_store

    model, source = model_and_source(first, second)
    on_ray = check_engine(engine)
    if not source.exists():
        _refuse_gone(source, store)
    keep_images = renamed(keep_images, keep_pictures, "--keep-images", "--keep-pictures")
    inputs = open_source(source, SourceSettings(encoding=encoding))
    settings: dict[str, Any] = settings_of(option, allow_pickle)
    embedder = Embedder.from_pretrained(model, **settings)
    facts = facts_of(embedder, model, options=settings, instruction=instruction, precision=precision)
    opened = open_store(store, create=facts)
    pool = RayPool(model, workers, address, gpus, {**settings, "dtype": embedder.dtype})
    with only_writer(opened), _engine(pool if on_ray else None, embedder) as encoder:
        report = _run(encoder, inputs, opened, keep_images, index)
    keep_text_side(embedder, facts)
    say_skipped(inputs)
    _say_report(report, store, errors or _errors_file(store))
    _say_store(opened, store, report)


def _engine(pool: RayPool | None, embedder: Embedder) -> AbstractContextManager[Embedder | OpenWriter]:
    """What encodes the rows: the actors of a pool, or the model in this process."""
    from vlm2vec.distributed.ray_index import ray_writer

    return nullcontext(embedder) if pool is None else ray_writer(pool)


def _run(
    encoder: Embedder | OpenWriter, inputs: Source, opened: VectorStore, keep_images: bool, index: str | None
) -> IndexReport:
    from vlm2vec.jobs.indexing import index_source

    with (
        resumable(lambda: f"{opened.uri} keeps its {opened.count()} rows"),
        progress_bar(f"indexing {inputs.path}", inputs.expected()) as advance,
    ):
        return index_source(encoder, inputs, opened, keep_images=keep_images, index=index, progress=advance)


def _say_report(report: IndexReport, store: str, errors: Path) -> None:
    """Prints what a run changed, and writes the list of unreadable inputs."""
    from vlm2vec.jobs.indexing import write_errors

    say(
        f"{report.num_new} new, {report.num_changed} changed, {report.num_same} unchanged, "
        f"{report.num_removed} removed; {report.num_encoded} encoded"
    )
    for name, count in report.gone.items():
        say(
            f"{name} no longer exists, and the store has {count} of its rows. If it was deleted: "
            f"{_command('forget', store, name)}. If it was moved: {_command('relocate', store, name, 'NEW')}"
        )
    write_errors(report, errors)
    if report.errors:
        say(f"{len(report.errors)} could not be read, listed in {errors}; the first: {report.errors[0][1]}")


def _say_store(opened: VectorStore, store: str, report: IndexReport) -> None:
    say(f"Store: {store}, {opened.count()} rows, search is {report.index.kind} ({report.index.reason})")
    opened.close()
    note_model(opened.facts.model)
    say(f'Next: vlm2vec search "a dog on the beach" --store {shlex.quote(store)}')


def load(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output of vlm2vec embed without an ending.")],
    *,
    store: StoreUri,
    index: Annotated[
        str | None,
        typer.Option("--index", help="exact, IVF_RQ, IVF_HNSW_SQ or IVF_PQ; default: by the number of rows."),
    ] = None,
) -> None:
    """Add a folder of vectors to a vector store, without a model; a killed run continues.

    Example: vlm2vec load vectors/ --store photos.lance
    """
    from vlm2vec.jobs.loading import count_rows, load_parts

    total = count_rows(folder)
    kept = f"{store} keeps the rows that were committed"
    with resumable(lambda: kept), progress_bar(f"loading {folder}", total) as advance:
        report = load_parts(folder, store, index, advance)
    say(f"{report.num_new} new, {report.num_known} already there")
    say(f"Store: {store}, {report.num_rows} rows, search is {report.index.kind} ({report.index.reason})")


def forget(
    store: StoreArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A source, or a folder or file below one.")],
) -> None:
    """Remove the rows of a source from a vector store; no file is deleted.

    Example: vlm2vec forget photos.lance old-photos/
    """
    from vlm2vec.jobs.moving import forget as forget_source
    from vlm2vec.jobs.stores import only_writer

    opened = open_vector_store(store)
    with only_writer(opened):
        removed = forget_source(opened, source)
    say(f"{removed} rows removed; {store} has {opened.count()} rows")
    opened.close()


def relocate(
    store: StoreArgument,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Earlier path of a source.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Path of the source now.")],
) -> None:
    """Give the rows of a source that was moved their new paths; nothing is encoded.

    Example: vlm2vec relocate photos.lance old-photos/ photos/
    """
    from vlm2vec.jobs.moving import relocate as relocate_source
    from vlm2vec.jobs.stores import only_writer

    if not Path(new).exists():
        raise UserError(f"{new}: no such file or folder; expected the path to which {old} was moved")
    opened = open_vector_store(store)
    with only_writer(opened):
        moved = relocate_source(opened, old, new)
    say(f"{moved} rows moved from {old} to {new}")
    opened.close()


def _command(*words: str) -> str:
    """A command that can be copied to a shell."""
    return shlex.join(["vlm2vec", *words])


def _refuse_gone(source: Path, store: str) -> None:
    """The error for a source that does not exist; says so if the store has rows of it.

    Raises:
        UserError: always.
    """
    from vlm2vec.jobs.indexing import source_name
    from vlm2vec.jobs.state import StoreState

    missing = f"{source}: no such file or folder"
    try:
        opened = open_vector_store(store)
    except UserError:
        raise UserError(missing) from None
    count = StoreState(opened).by_source()[source_name(source)]
    opened.close()
    if count:
        missing += (
            f"; {store} has {count} of its rows. If it was deleted: {_command('forget', store, str(source))}. "
            f"If it was moved: {_command('relocate', store, str(source), 'NEW')}"
        )
    raise UserError(missing)


def _errors_file(store: str) -> Path:
    """Beside a local store; for one of a server, in the working folder."""
    if "://" in store:
        return Path(f"{store.rstrip('/').rpartition('/')[2]}.errors.jsonl")
    return Path(f"{store.rstrip('/')}.errors.jsonl")
