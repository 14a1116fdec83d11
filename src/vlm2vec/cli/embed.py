"""The command that makes files of vectors: embed."""

from __future__ import annotations

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
    WorkersOption,
    check_engine,
    model_and_source,
    say_skipped,
    settings_of,
)
from vlm2vec.media.text import ENCODING
from vlm2vec.progress import progress_bar, say

if TYPE_CHECKING:
    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.jobs.embed import EmbedReport, Job
    from vlm2vec.models.embedder import Embedder


def embed(
    first: ModelArgument = None,
    second: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT",
            help="Folder of images, texts, PDFs, videos; or a .txt, .jsonl, .csv, .parquet, .zip, .tar file.",
        ),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="OUT.parquet, OUT.npy, OUT.lance or the folder OUT.")],
    instruction: Annotated[
        str | None, typer.Option(help="Instruction; default: the model's own for documents.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Precision of the output: float32, float16, int8, uint8, binary or ubinary.")
    ] = "float32",
    truncate_dim: Annotated[int | None, typer.Option(help="Keep only the first dimensions.")] = None,
    every: Annotated[float | None, typer.Option(help="Embed one video frame every N seconds.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Text column of a table; default: found by name.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Image column of a table; default: found by name.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Key column of a table; default: found by name.")] = None,
    encoding: EncodingOption = ENCODING,
    part: Annotated[int, typer.Option(min=1, help="Inputs per part: the most that a kill can lose.")] = 1024,
    engine: Annotated[str, typer.Option(help="local, or ray to embed the parts on a Ray cluster.")] = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    address: AddressOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Embed a folder or file into a file of vectors; a killed run resumes, and unreadable inputs go to errors.jsonl.

    Example: vlm2vec embed photos/ -o vectors.parquet
    """
    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.jobs.embed import EmbedSettings, Job, check_output, was_finished
    from vlm2vec.jobs.records import SourceSettings
    from vlm2vec.jobs.sources import open_source
    from vlm2vec.jobs.stores import facts_of
    from vlm2vec.models.embedder import Embedder

    model, source = model_and_source(first, second)
    by_ray = check_engine(engine)
    settings = EmbedSettings(instruction, truncate_dim, precision, part)
    columns = SourceSettings(every, text_column, image_column, key_column, encoding)
    if was_finished(output):
        say(f"{output}: already finished by an earlier run")
        return
    check_output(output, settings, overwrite)
    records = open_source(source, columns)
    say(f"{source} -> {output}")
    options: dict[str, Any] = settings_of(option, allow_pickle)
    embedder = Embedder.from_pretrained(model, **options)
    facts = facts_of(embedder, model, options=options, instruction=instruction)
    job = Job(records, output, settings, facts, overwrite)
    pool = RayPool(model, workers, address, gpus, {**options, "dtype": embedder.dtype}) if by_ray else None
    _say_result(_run(job, embedder, pool), job)


def _run(job: Job, embedder: Embedder, pool: RayPool | None) -> EmbedReport:
    from vlm2vec.distributed.ray_embed import run_on_ray

    source = job.source.path
    with resumable(job.kept), progress_bar(f"embedding {source.name or source}", job.source.expected()) as advance:
        if pool is not None:
            run_on_ray(job, pool, advance)
        else:
            job.run(embedder, advance)
        return job.finish()


def _say_result(done: EmbedReport, job: Job) -> None:
    from vlm2vec.jobs.embed import ERRORS_FILE

    say_skipped(job.source)
    if done.num_kept:
        say(f"{done.num_kept} inputs were embedded by an earlier run")
    if done.errors:
        say(f"{len(done.errors)} inputs could not be embedded: {job.output.with_name(ERRORS_FILE)}")
    say(f"{done.num_vectors} vectors: {job.output}")
