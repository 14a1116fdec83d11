"""The verb that makes files of vectors: embed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm2vec.cli.options import (
    AddressOption,
    GpusOption,
    ModelArgument,
    OptionsOption,
    PickleOption,
    WorkersOption,
    check_engine,
    model_and_source,
    settings_of,
)
from vlm2vec.progress import say


def embed(
    first: ModelArgument = None,
    second: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT",
            help="Folder of pictures, texts, PDFs, videos; or a .txt, .jsonl, .csv, .parquet, .zip, .tar file.",
        ),
    ] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="OUT.parquet, OUT.npy or OUT.lance.")],
    instruction: Annotated[str | None, typer.Option(help="Default: the model's own for documents.")] = None,
    precision: Annotated[str, typer.Option(help="float32, float16, int8, uint8, binary or ubinary.")] = "float32",
    truncate_dim: Annotated[int | None, typer.Option(help="Keep the first dimensions only.")] = None,
    every: Annotated[float | None, typer.Option(help="Of a video: a vector every so many seconds.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Of a table; default: found by name.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Of a table; default: found by name.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Of a table; default: found by name.")] = None,
    part: Annotated[int, typer.Option(min=1, help="Inputs that are kept at a time: what a kill can lose.")] = 1024,
    engine: Annotated[str, typer.Option(help="local, or ray: the parts on the workers of a Ray cluster.")] = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    address: AddressOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Make a file of vectors. Killed and started again, it goes on where it stopped; bad files go to errors.jsonl."""
    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.distributed.ray_embed import run_on_ray
    from vlm2vec.jobs.embed import ERRORS_FILE, EmbedSettings, Job, check_output, was_finished
    from vlm2vec.jobs.records import SourceSettings
    from vlm2vec.jobs.sources import open_source
    from vlm2vec.jobs.stores import facts_of
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.progress import progress_bar

    model, source = model_and_source(first, second)
    by_ray = check_engine(engine)
    settings = EmbedSettings(instruction, truncate_dim, precision, part)
    columns = SourceSettings(every, text_column, image_column, key_column)
    if was_finished(output):
        say(f"{output}: an earlier run had finished it")
        return
    check_output(output, settings, overwrite)
    records = open_source(source, columns)
    total = records.count()
    say(f"{source}: {total} inputs -> {output}")
    options: dict[str, Any] = settings_of(option, allow_pickle)
    embedder = Embedder.from_pretrained(model, **options)
    facts = facts_of(embedder, model, options=options, instruction=instruction)
    job = Job(records, output, settings, facts, overwrite)
    with progress_bar(f"embedding {source.name or source}", total) as advance:
        if by_ray:
            run_on_ray(job, RayPool(model, workers, address, gpus, {**options, "dtype": embedder.dtype}), advance)
        else:
            job.run(embedder, advance)
    done = job.finish()
    if records.passed_over:
        endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in records.passed_over.items())
        say(f"Files that are no inputs: {endings}")
    if done.num_kept:
        say(f"{done.num_kept} of the inputs were embedded by an earlier run")
    if done.errors:
        say(f"{len(done.errors)} inputs could not be embedded: {output.with_name(ERRORS_FILE)}")
    say(f"{done.num_vectors} vectors: {output}")
