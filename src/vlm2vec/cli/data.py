"""Commands on data: prepare, check, show and fetch benchmarks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vlm2vec.cli.options import DataOption, TasksOption
from vlm2vec.errors import UserError, shown
from vlm2vec.progress import say

SHOWN_CANDIDATES = 5


def data_demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Parent folder; default: the user's cache folder.")
    ] = None,
) -> None:
    """Prepare the demo benchmark: emoji of three vendors in the MMEB layout.

    Example: vlm2vec data demo -o data
    """
    from vlm2vec.cache import cache_folder
    from vlm2vec.data.emoji.prepare import prepare_demo
    from vlm2vec.progress import stage_bars

    with stage_bars() as update:
        root = prepare_demo(output or cache_folder(), progress=update)
    say(f"Demo benchmark: {root}\nNext: vlm2vec eval compact --benchmark {root}/benchmark.yaml -o runs/compact")


def data_sample(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New or empty folder for the photographs.")],
) -> None:
    """Copy twelve photographs that ship with vlm2vec into a folder, to try the other commands on.

    Example: vlm2vec data sample photos/
    """
    from vlm2vec.media.samples import CREDITS, copy_photographs

    number = copy_photographs(folder)
    say(f"{number} photographs: {folder}, credits: {CREDITS}")
    say(f"Next: vlm2vec index {folder} --store photos.lance")


def data_check(
    benchmark: Annotated[str, typer.Argument(help="A shipped benchmark or a YAML file.")],
    data: DataOption = None,
    task: TasksOption = None,
) -> None:
    """Check a benchmark's data: what is present, what is missing, and how to get it. Exit with 1 if data is missing.

    Example: vlm2vec data check mmeb-v1 --data mmeb
    """
    from rich.table import Table

    from vlm2vec.evaluation.benchmark import load_benchmark
    from vlm2vec.evaluation.data_check import check_data
    from vlm2vec.progress import progress_bar

    facts, folder = load_benchmark(benchmark, data)
    facts = facts.only(task) if task else facts
    with progress_bar("checking", len(facts.tasks)) as advance:
        checks = check_data(facts, folder, advance)
    table = Table(title=f"{facts.name} in {folder}")
    for heading in ("task", "status", "rows", "queries", "inputs", "images", "missing", "rows, MB"):
        table.add_column(heading, justify="left" if heading in ("task", "status", "rows") else "right")
    for check in checks:
        counts = (check.num_queries, check.num_inputs, check.num_images, check.num_missing)
        table.add_row(check.task.name, check.status, check.form, *map(str, counts), f"{check.num_bytes / 1e6:.1f}")
    say(table)
    for check in checks:
        if check.detail:
            say(f"{check.task.name}: {check.status}: {check.detail}")
    ready = sum(check.status == "ready" for check in checks)
    say(f"{ready} of {len(checks)} tasks are ready")
    if ready < len(checks):
        raise typer.Exit(1)


def data_show(
    benchmark: Annotated[str, typer.Argument(help="A shipped benchmark or a YAML file.")],
    task: Annotated[str, typer.Argument(help="Name of the task.")],
    data: DataOption = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Write prompts as this model reads them; its weights are not loaded.")
    ] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="Write prompts as this family reads them; default: qwen2_vl.")
    ] = None,
    rows: Annotated[str, typer.Option("--rows", help="Queries to show, as FIRST:LAST+1 or a number.")] = "0:3",
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", min=0, help="Candidates per query, relevant ones in any case; default: 5, all in JSON."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the images to this file.")] = None,
) -> None:
    """Show what a model reads: prompts, images and frames in order, candidates and gold.

    Example: vlm2vec data show mmeb-v2 MSR-VTT --data mmeb --family qwen2_vl --rows 0:3
    """
    from vlm2vec.evaluation import show
    from vlm2vec.evaluation.benchmark import load_benchmark
    from vlm2vec.evaluation.prompt_format import DEFAULT_FAMILY, PromptFormat, format_of
    from vlm2vec.files import write_text
    from vlm2vec.models.checkpoints.known import evaluation_of

    if model and family:
        raise UserError("--model and --family: give only one of them")
    prompts = format_of(model) if model else PromptFormat(family or DEFAULT_FAMILY)
    facts, folder = load_benchmark(benchmark, data)
    facts = facts.with_switches(evaluation_of(model or ""))
    limit = candidates if candidates is not None or as_json else SHOWN_CANDIDATES
    found = show.show_task(facts, facts.only([task]).tasks[0], folder, prompts, rows_of(rows), limit)
    if html:
        write_text(html, show.as_html(found))
        say(f"Page: {html}")
    elif as_json:
        say(json.dumps(show.as_json(found), ensure_ascii=False, indent=2))
    else:
        say(show.as_text(found))


def rows_of(text: str) -> slice:
    """A range of rows: `0:3`, `5:` or a single number.

    Raises:
        UserError: for another text.
    """
    if re.fullmatch(r"\d+", text):
        return slice(int(text), int(text) + 1)
    if re.fullmatch(r"\d*:\d*", text):
        first, _, end = text.partition(":")
        return slice(int(first or 0), int(end) if end else None)
    raise UserError(f"--rows {shown(text)}: expected a range such as 0:3, or a number")


def data_fetch(
    benchmark: Annotated[str, typer.Argument(help="A shipped benchmark or a YAML file.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of the evaluation sets; created if missing.")],
    task: TasksOption = None,
    rows_only: Annotated[bool, typer.Option("--rows-only", help="Skip the image archives.")] = False,
    size_only: Annotated[bool, typer.Option("--size", help="Print the size of the download and exit.")] = False,
) -> None:
    """Download a benchmark's data from the hub and record its revisions.

    Example: vlm2vec data fetch mmeb-v1 --data mmeb --task ImageNet-1K
    """
    from huggingface_hub import snapshot_download
    from rich.filesize import decimal

    from vlm2vec.evaluation.benchmark import read_benchmark
    from vlm2vec.evaluation.data_check import download_size, fetch_task

    facts, _ = read_benchmark(benchmark)
    tasks = (facts.only(task) if task else facts).tasks
    num_files, num_bytes = download_size(tasks, media=not rows_only)
    say(f"{benchmark}: {decimal(num_bytes)} in {num_files} files")
    if size_only:
        return
    data.mkdir(parents=True, exist_ok=True)
    for one in tasks:
        found = fetch_task(one, data, snapshot_download, media=not rows_only)
        say(f"{one.name}: " + ", ".join(f"{name}@{revision}" for name, revision in found.items()))
    chosen = "".join(f" --task {shlex.quote(name)}" for name in task or [])
    say(f"Next: vlm2vec data check {benchmark} --data {data}{chosen}")
