"""The command line: one function a verb, each a thin wrapper of a function of the library.

Nothing heavy is imported before a verb needs it: `vlm2vec --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm2vec.errors import UserError
from vlm2vec.progress import say

app = typer.Typer(
    help="Turn a vision-language model into one embedding model for text and pictures: train, measure, use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look at and clean the vectors that evaluations keep.", no_args_is_help=True)
app.add_typer(store_app, name="store")
data_app = typer.Typer(help="Prepare and look at data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
OptionsOption = Annotated[
    list[str] | None, typer.Option("--option", help="Setting of the model's family, key=value; may be repeated.")
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of kept vectors; default: in the user's cache folder.")
]

TasksOption = Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of the evaluation sets.")]
PickleOption = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights; they can run code.")]


@app.command()
def demo(
    output: OutputOption = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option(help="Train again even where results are there.")] = False,
) -> None:
    """Prepare a benchmark, train the built-in model, score it beside a dual encoder, and report."""
    from vlm2vec.demo import run_demo

    run_demo(output, fresh=fresh)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as train.steps=100.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last step checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Two steps on a tiny random model of the same family.")] = False,
) -> None:
    """Train an embedding model by a recipe."""
    from vlm2vec.training.config import dump_recipe, load_recipe
    from vlm2vec.training.run import train as run_train

    settings = load_recipe(recipe, overrides or [])
    say(dump_recipe(settings))
    if dry_run:
        from vlm2vec.training.dry_run import dry_run as run_dry

        losses = ", ".join(f"{entry['loss']:.3f}" for entry in run_dry(settings))
        say(f"Dry run: losses {losses}; the recipe builds. Next: vlm2vec train {recipe}")
        return
    monitor = None
    if settings.evaluate is not None:
        from vlm2vec.monitor import Monitor

        monitor = Monitor(settings)
    folder = run_train(settings, resume=resume, monitor=monitor)
    say(f"Trained model: {folder}\nNext: vlm2vec eval {folder} --benchmark BENCHMARK.yaml -o {folder}/eval")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub id, or the built-in compact.")],
    benchmark: Annotated[str, typer.Option(help="A shipped benchmark (mmeb-v1, mmeb-v2) or a YAML file.")],
    output: OutputOption,
    data: Annotated[Path | None, typer.Option(help="Folder of the evaluation sets, if not as the file says.")] = None,
    option: OptionsOption = None,
    store: StoreOption = None,
    task: TasksOption = None,
    allow_pickle: PickleOption = False,
    switch: Annotated[
        list[str] | None, typer.Option(help="How rows become inputs, such as identity=content; see docs/mmeb.md.")
    ] = None,
) -> None:
    """Score a model on a benchmark; writes results.json, a Markdown table, a leaderboard file and an HTML report."""
    from vlm2vec.evaluation.evaluate import results_json
    from vlm2vec.evaluation.report import comparison_table
    from vlm2vec.evaluation.run import score_model

    settings = _settings(option, allow_pickle)
    switches = dict(_key_value(text, "--switch", "identity=content") for text in switch or [])
    facts, results = score_model(
        model, benchmark, output, data=data, options=settings, store=store, names=task or [], switches=switches
    )
    if not results:  # another process of torchrun reports
        return
    say(comparison_table({model: results_json(model, facts, results)}).table)
    say(f"Results: {output}/results.json\nReport:  {output}/report.html")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    against: Annotated[
        str | None, typer.Option(help="Compare with another library: sentence-transformers, server or vllm.")
    ] = None,
    url: Annotated[str, typer.Option(help="Of the server, up to /v1/embeddings.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Name of the model on the server.")] = "vlm2vec",
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Recompute a checkpoint's golden vectors and compare: with the saved ones, or with another library's."""
    from vlm2vec.models.verify import report_against, report_saved

    settings = _settings(option, allow_pickle)
    lines = report_against(folder, against, url, model, settings) if against else report_saved(folder, settings)
    say("\n".join(lines))


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, or the built-in compact.")],
    to: Annotated[str, typer.Option(help="merged, sentence-transformers, onnx or openvino.")],
    output: OutputOption,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Write a checkpoint in another form and compare its vectors with the source's."""
    from vlm2vec.models.export import export as run_export

    settings = _settings(option, allow_pickle)
    done = run_export(source, to, output, **settings)
    size = sum(path.stat().st_size for path in done.files) / 1e6
    say(f"{output}: {len(done.files)} files, {size:.1f} MB")
    say(f"Lowest cosine to the source: {done.cosine:.6f} of {done.num_inputs} inputs")


@app.command()
def mine(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub id, or the built-in compact.")],
    data: Annotated[Path, typer.Argument(help="A folder in the MMEB-train layout.")],
    output: OutputOption,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Only this set; may be repeated.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Negatives a pair at most.")] = 1,
    skip: Annotated[int, typer.Option(min=0, help="Pass over the nearest so many: often unmarked positives.")] = 0,
    max_rank: Annotated[int, typer.Option(min=1, help="Not beyond this rank.")] = 100,
    margin: Annotated[float, typer.Option(help="A negative's cosine is so far below the positive's at least.")] = 0.0,
) -> None:
    """Find hard negatives in training sets by a model; writes the sets again with them."""
    from vlm2vec.training.mining import MiningRule
    from vlm2vec.training.mining import mine as run_mining

    rule = MiningRule(num, skip, max_rank, margin)
    for name, mean in run_mining(model, data, output, rule, sets or ()).items():
        say(f"{name}: {mean:.2f} negatives a pair")
    say(f"Sets with negatives: {output}\nNext: vlm2vec train RECIPE.yaml data.root={output}")


@data_app.command("demo")
def data_demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Parent folder; default: the user's cache folder.")
    ] = None,
) -> None:
    """Prepare the demo benchmark: emoji of three vendors in the MMEB layout."""
    from vlm2vec.cache import cache_folder
    from vlm2vec.data.demo import prepare_demo
    from vlm2vec.progress import stage_bars

    with stage_bars() as update:
        root = prepare_demo(output or cache_folder(), progress=update)
    say(f"Demo benchmark: {root}\nNext: vlm2vec eval compact --benchmark {root}/benchmark.yaml -o runs/compact")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `vlm2vec eval` wrote, or leaderboard JSON files.")],
    output: OutputOption = Path("runs/report"),
) -> None:
    """Set runs beside the published scores: Markdown, CSV, an HTML page with plots, leaderboard files."""
    from vlm2vec.evaluation.overview import read_run, write_overview

    seen = write_overview(output, [read_run(path) for path in runs])
    for row in seen.runs:
        means = ", ".join(f"{group} {score:.1f}" for group, score in row.scores.items() if score is not None)
        say(f"{row.model}: {means}")
    for note in seen.notes:
        say(note)
    say(f"Report: {output}/report.html, report.md, report.csv")


@data_app.command("check")
def data_check(
    benchmark: Annotated[str, typer.Argument(help="A shipped benchmark or a YAML file.")],
    data: DataOption = None,
    task: TasksOption = None,
) -> None:
    """Say what of a benchmark's data is there, what is missing and how to get it; exits 1 if something is missing."""
    from rich.table import Table

    from vlm2vec.evaluation.benchmark import load_benchmark
    from vlm2vec.evaluation.data_check import check_data
    from vlm2vec.progress import progress_bar

    facts, folder = load_benchmark(benchmark, data)
    facts = facts.only(task) if task else facts
    with progress_bar("checking", len(facts.tasks)) as advance:
        checks = check_data(facts, folder, advance)
    table = Table(title=f"{facts.name} in {folder}")
    for heading in ("task", "status", "queries", "inputs", "pictures", "missing", "rows, MB"):
        table.add_column(heading, justify="left" if heading in ("task", "status") else "right")
    for check in checks:
        counts = (check.num_queries, check.num_inputs, check.num_pictures, check.num_missing)
        table.add_row(check.task.name, check.status, *map(str, counts), f"{check.num_bytes / 1e6:.1f}")
    say(table)
    for check in checks:
        if check.detail:
            say(f"{check.task.name}: {check.status}: {check.detail}")
    ready = sum(check.status == "ready" for check in checks)
    say(f"{ready} of {len(checks)} tasks are ready")
    if ready < len(checks):
        raise typer.Exit(1)


@data_app.command("fetch")
def data_fetch(
    benchmark: Annotated[str, typer.Argument(help="A shipped benchmark or a YAML file.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of the evaluation sets, made if absent.")],
    task: TasksOption = None,
    rows_only: Annotated[bool, typer.Option("--rows-only", help="Without the archives of pictures.")] = False,
) -> None:
    """Download a benchmark's data from the hub and record its revisions."""
    from huggingface_hub import snapshot_download

    from vlm2vec.evaluation.benchmark import read_benchmark
    from vlm2vec.evaluation.data_check import fetch_task

    facts, _ = read_benchmark(benchmark)
    data.mkdir(parents=True, exist_ok=True)
    for one in (facts.only(task) if task else facts).tasks:
        found = fetch_task(one, data, snapshot_download, media=not rows_only)
        say(f"{one.name}: " + ", ".join(f"{name}@{revision}" for name, revision in found.items()))
    say(f"Next: vlm2vec data check {benchmark} --data {data}")


@store_app.command("ls")
def store_ls(store: StoreOption = None) -> None:
    """List the kept vectors: fingerprint, model, how many, how large, when last used."""
    from datetime import datetime

    from rich.table import Table

    from vlm2vec.retrieval.store import default_store, list_store

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


@store_app.command("clean")
def store_clean(
    fingerprints: Annotated[list[str] | None, typer.Argument(help="From `vlm2vec store ls`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all vectors.")] = False,
    store: StoreOption = None,
) -> None:
    """Remove kept vectors, and what killed processes left half-written."""
    from vlm2vec.retrieval.store import clean_store, default_store, list_store

    root = store or default_store()
    names = [entry.fingerprint for entry in list_store(root)] if everything else fingerprints or []
    say(f"{root}: {clean_store(root, names) / 1e6:.1f} MB freed")


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)


def _settings(option: list[str] | None, allow_pickle: bool) -> dict[str, object]:
    return dict(_key_value(text) for text in option or []) | ({"allow_pickle": True} if allow_pickle else {})


def _key_value(text: str, option: str = "--option", example: str = "num_layers=4") -> tuple[str, object]:
    import yaml

    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"{option} {text!r}: expected key=value, such as {example}")
    return key, yaml.safe_load(value)


if __name__ == "__main__":
    main()
