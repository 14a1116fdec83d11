"""Commands that evaluate a model: eval, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm2vec.cli.options import (
    AddressOption,
    CacheOption,
    DataOption,
    GpusOption,
    OldCacheOption,
    OptionsOption,
    OutputOption,
    PickleOption,
    TasksOption,
    WorkersOption,
    check_engine,
    key_value,
    renamed,
    settings_of,
)
from vlm2vec.progress import say


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run, a checkpoint folder, a hub id, a built-in model, or the URL of an endpoint.")
    ],
    benchmark: Annotated[str, typer.Option(help="A shipped benchmark (mmeb-v1, mmeb-v2, mmeb-v3) or a YAML file.")],
    output: OutputOption,
    data: DataOption = None,
    option: OptionsOption = None,
    cache: CacheOption = None,
    store: OldCacheOption = None,
    task: TasksOption = None,
    engine: Annotated[str, typer.Option(help="local, or ray: encode on the actors of a Ray cluster.")] = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    address: AddressOption = None,
    name: Annotated[str | None, typer.Option("--model", help="For a URL: name of the model at the endpoint.")] = None,
    allow_pickle: PickleOption = False,
    switch: Annotated[
        list[str] | None,
        typer.Option(help="How rows become inputs, as key=value, such as identity=content; the MMEB guide lists them."),
    ] = None,
) -> None:
    """Score a model on a benchmark; write results.json, a Markdown table, a leaderboard file and an HTML report.

    Example: vlm2vec eval runs/mine --benchmark mmeb-v1 --data mmeb --task ImageNet-1K -o runs/mine/eval
    """
    from contextlib import nullcontext
    from functools import partial

    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.distributed.ray_eval import ray_engine
    from vlm2vec.errors import UserError
    from vlm2vec.evaluation.comparison import comparison_table
    from vlm2vec.evaluation.endpoint import Endpoint, EndpointEngine
    from vlm2vec.evaluation.evaluate import results_json
    from vlm2vec.evaluation.run import score_model

    cache = renamed(cache, store, "--cache", "--store")
    settings = settings_of(option, allow_pickle)
    switches = dict(key_value(text, "--switch", "identity=content") for text in switch or [])
    pool = RayPool(model, workers, address, gpus, settings)
    opens: Any = partial(ray_engine, pool) if check_engine(engine) else None
    if model.startswith(("http://", "https://")):
        endpoint = Endpoint.of(model, name, settings)
        model, opens = endpoint.model, lambda: nullcontext(EndpointEngine(endpoint))
    elif name:
        raise UserError(f"--model {name}: only for an endpoint's URL; leave it out, the model is {model}")
    facts, results = score_model(
        model, benchmark, output, data, settings, cache=cache, names=task or [], switches=switches, engine=opens
    )
    if not results:  # only rank 0 reports
        return
    say(comparison_table({model: results_json(model, facts, results)}).table)
    say(f"Results: {output}/results.json\nReport:  {output}/report.html")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of `vlm2vec eval`, or leaderboard JSON files.")],
    output: OutputOption = Path("runs/report"),
) -> None:
    """Compare runs with the published scores: Markdown, CSV, an HTML page with plots, leaderboard files.

    Example: vlm2vec report runs/mine/eval runs/base/eval -o runs/report
    """
    from vlm2vec.evaluation.overview import read_run, write_overview

    seen = write_overview(output, [read_run(path) for path in runs])
    for row in seen.runs:
        means = ", ".join(f"{group} {score:.1f}" for group, score in row.scores.items() if score is not None)
        say(f"{row.model}: {means}")
    for note in seen.notes:
        say(note)
    say(f"Report: {output}/report.html, report.md, report.csv")
