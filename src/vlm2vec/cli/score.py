"""Commands that evaluate a model: eval, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    RerankCosineOption,
    TasksOption,
    WorkersOption,
    check_engine,
    key_value,
    renamed,
    rerank_cosine_of,
    settings_of,
)
from vlm2vec.progress import say

if TYPE_CHECKING:
    from vlm2vec.distributed.cluster import RayPool


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
    rerank: Annotated[
        str | None, typer.Option(help="A VLM that reranks the first candidates of each query: folder or hub id.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of candidates of each query that --rerank reads.")] = 50,
    rerank_cosine: RerankCosineOption = 0.0,
) -> None:
    """Score a model on a benchmark; write results.json, a Markdown table, a leaderboard file and an HTML report.

    Example: vlm2vec eval runs/mine --benchmark mmeb-v1 --data mmeb --task ImageNet-1K -o runs/mine/eval
    """
    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.evaluation.comparison import comparison_table
    from vlm2vec.evaluation.evaluate import results_json
    from vlm2vec.evaluation.reranked import columns_of
    from vlm2vec.evaluation.run import Stages, score_model
    from vlm2vec.evaluation.second_stage import RerankOptions

    cosine_weight = rerank_cosine_of(rerank_cosine, rerank)
    settings = settings_of(option, allow_pickle)
    pool = RayPool(model, workers, address, gpus, settings)
    model, opens = _engine(pool, check_engine(engine), name)
    facts, results = score_model(
        model,
        benchmark,
        output,
        data,
        settings,
        cache=renamed(cache, store, "--cache", "--store"),
        names=task or [],
        switches=dict(key_value(text, "--switch", "identity=content") for text in switch or []),
        stages=Stages(opens, RerankOptions(rerank, top, cosine_weight) if rerank else None),
    )
    if not results:  # only rank 0 reports
        return
    say(comparison_table(columns_of(results_json(model, facts, results))).table)
    say(f"Results: {output}/results.json\nReport:  {output}/report.html")


def _engine(pool: RayPool, on_ray: bool, name: str | None) -> tuple[str, Any]:
    """The name of the model, and what opens the engine that encodes; None: the model in this process.

    Raises:
        UserError: for a name that is not needed.
    """
    from contextlib import nullcontext
    from functools import partial

    from vlm2vec.distributed.ray_eval import ray_engine
    from vlm2vec.errors import UserError
    from vlm2vec.evaluation.endpoint import Endpoint, EndpointEngine

    if pool.model.startswith(("http://", "https://")):
        endpoint = Endpoint.of(pool.model, name, pool.options)
        return endpoint.model, lambda: nullcontext(EndpointEngine(endpoint))
    if name:
        raise UserError(f"--model {name}: only for an endpoint's URL; leave it out, the model is {pool.model}")
    return pool.model, partial(ray_engine, pool) if on_ray else None


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of `vlm2vec eval`, or leaderboard JSON files.")],
    output: OutputOption = Path("runs/report"),
) -> None:
    """Compare runs with the published scores: Markdown, CSV, an HTML page with plots, leaderboard files.

    Example: vlm2vec report runs/mine/eval runs/base/eval -o runs/report
    """
    from vlm2vec.evaluation.overview import read_run, write_overview
    from vlm2vec.evaluation.reranked import columns_of

    seen = write_overview(output, [column for path in runs for column in columns_of(read_run(path)).values()])
    for row in seen.runs:
        means = ", ".join(f"{group} {score:.1f}" for group, score in row.scores.items() if score is not None)
        say(f"{row.model}: {means}")
    for note in seen.notes:
        say(note)
    say(f"Report: {output}/report.html, report.md, report.csv")
