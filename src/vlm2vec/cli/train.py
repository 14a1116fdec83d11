"""Commands that train: demo, train, recipes, mine, merge."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlm2vec.cli.options import AddressOption, GpusOption, OutputOption, WorkersOption, check_engine
from vlm2vec.cli.plan import verdict_for
from vlm2vec.errors import UserError
from vlm2vec.progress import say

if TYPE_CHECKING:
    from vlm2vec.training.config import Recipe


def demo(
    output: OutputOption = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option(help="Train again even if a finished run exists.")] = False,
) -> None:
    """Prepare a benchmark, train the built-in model, score it beside a dual encoder, and report.

    Example: vlm2vec demo -o runs/demo
    """
    from vlm2vec.demo import run_demo

    run_demo(output, fresh=fresh)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|DATA",
            help="A recipe (YAML file or name, see `vlm2vec recipes`), or your pairs: a .jsonl, .json, .csv, .tsv or "
            ".parquet file, or a folder of images with captions.",
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as train.steps=100.")] = None,
    base: Annotated[str | None, typer.Option(help="Model to train; default for pairs: compact.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    query: Annotated[list[str] | None, typer.Option(help="Column of the query; twice for text and image.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Column of the target; twice for text and image.")] = None,
    negative: Annotated[list[str] | None, typer.Option(help="Column of a negative; may be repeated.")] = None,
    holdout: Annotated[float, typer.Option(help="Share of the pairs to evaluate on, before and after.")] = 0.1,
    init: Annotated[Path | None, typer.Option(help="Write a commented recipe to this file and exit.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last step checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run two steps on a tiny random model of the same family.")
    ] = False,
    show_recipe: Annotated[bool, typer.Option("--show-recipe", help="Print every setting.")] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Start even if the plan says that the GPU's memory is too small.")
    ] = False,
) -> None:
    """Train an embedding model or a reranker by a recipe, or on your own pairs with settings chosen for the model.

    Example: vlm2vec train pairs.jsonl --base Qwen/Qwen2-VL-2B-Instruct -o runs/mine
    """
    if init is not None:
        from vlm2vec.training.init_recipe import write_commented_recipe

        write_commented_recipe(init)
        say(f"Recipe: {init}\nNext: vlm2vec train {init} --dry-run")
        return
    if recipe is None:
        raise UserError("RECIPE|DATA is missing: give a recipe such as photos, a file of pairs, or --init FILE")
    settings, command = _settings_of(recipe, overrides or [], base, output, (query, target, negative), holdout, resume)
    _say_settings(settings, show_recipe)
    if dry_run:
        from vlm2vec.training.dry_run import dry_run as run_dry

        losses = ", ".join(f"{entry['loss']:.3f}" for entry in run_dry(settings))
        say(f"Dry run: losses {losses}; the recipe builds. Next: {command}")
        return
    if found := verdict_for(settings):
        say(found[0])
        if not (found[1] or anyway):
            raise UserError(f"{recipe}: the GPU's memory is too small; change a setting above, or add --anyway")
    _run(settings, resume)


def _settings_of(
    name: str,
    overrides: list[str],
    base: str | None,
    output: Path | None,
    columns: tuple[list[str] | None, ...],
    holdout: float,
    resume: bool,
) -> tuple[Recipe, str]:
    """The recipe of a name or of pairs, and the command that trains by it."""
    from vlm2vec.data.pair_tables import is_table
    from vlm2vec.training.config import load_recipe
    from vlm2vec.training.recipes import find_recipe, shipped_recipes

    changes = [f"output={output}"] if output else []
    if name in shipped_recipes() or not is_table(Path(name)):  # a folder of that name is ./NAME
        if any(columns):
            raise UserError(f"{name}: --query, --target and --negative are for files of pairs, not for recipes")
        changes += [f"model.base={base}"] if base else []
        return load_recipe(find_recipe(name), [*changes, *overrides]), " ".join(["vlm2vec train", name, *overrides])
    from vlm2vec.training.own_data import prepare

    if output is None:
        raise UserError(f"{name}: --output is missing: the folder of the run, such as -o runs/mine")
    query, target, negatives = (tuple(column or ()) for column in columns)
    own = prepare(Path(name), base or "compact", output, query, target, negatives, holdout, resume=resume)
    say("\n".join(own.lines))
    return load_recipe(own.file, overrides), " ".join(["vlm2vec train", str(own.file), *overrides])


def _say_settings(settings: Recipe, everything: bool) -> None:
    from vlm2vec.training.config import dump_recipe

    if everything:
        say(dump_recipe(settings))
        return
    train, lora = settings.train, settings.lora
    adapter = f"LoRA of rank {lora.rank}, alpha {lora.alpha}" if lora else "no LoRA"
    say(f"Model: {settings.model.base}; {adapter}")
    say(
        f"Data: {settings.data.root}; {settings.data.batching} batches of {train.batch_size} pairs, {train.steps} steps"
    )
    loss = f"{settings.loss.kind}, temperature {train.temperature}"
    if settings.task == "rerank":
        loss = f"{settings.rerank.loss} over {settings.rerank.candidates} candidates of a query"
    say(f"Loss: {loss}; learning rate {train.learning_rate}")
    say(f"Run: {settings.output} (--show-recipe prints every setting)")


def _run(settings: Recipe, resume: bool) -> None:
    from vlm2vec.training.run import train as run_train

    if settings.evaluate is None:
        folder = run_train(settings, resume=resume)
        say(f"Trained model: {folder}\nNext: {_evaluation_of(settings)}")
        return
    from vlm2vec.monitor import Monitor
    from vlm2vec.training.output import read_history

    folder = run_train(settings, resume=resume, monitor=Monitor(settings))
    history, group = read_history(folder), settings.evaluate.best_by
    scores = ", ".join(f"{100 * entry['groups'][group]:.1f} at step {entry['step']}" for entry in history)
    say(f"Evaluation ({group}, percent): {scores}\nTrained model: {folder}")
    say(f"Next: vlm2vec eval {folder} --benchmark {settings.evaluate.benchmark} -o {folder}/eval")


def _evaluation_of(settings: Recipe) -> str:
    """The command that evaluates the trained model."""
    folder = settings.output
    model = str(folder) if settings.task == "embed" else f"EMBEDDER --rerank {folder} --top 20"
    return f"vlm2vec eval {model} --benchmark BENCHMARK.yaml -o {folder}/eval"


def recipes() -> None:
    """List the shipped recipes, one a line.

    Example: vlm2vec recipes
    """
    from vlm2vec.training.recipes import shipped_recipes

    found = shipped_recipes()
    width = max(map(len, found))
    for name, summary in found.items():
        say(f"{name:<{width}}  {summary}")


def mine(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub id or a built-in model.")],
    data: Annotated[Path, typer.Argument(help="A folder in the MMEB-train layout.")],
    output: OutputOption,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Use this set only; may be repeated.")] = None,
    num: Annotated[int, typer.Option(min=1, help="At most this many negatives for each pair.")] = 1,
    skip: Annotated[
        int, typer.Option(min=0, help="Skip this many nearest targets, which are often unmarked positives.")
    ] = 0,
    max_rank: Annotated[int, typer.Option(min=1, help="Take no target beyond this rank.")] = 100,
    margin: Annotated[
        float | None,
        typer.Option(
            help="A negative's cosine is at least this far below the positive's. Default: 0; with --judge: any."
        ),
    ] = None,
    pick: Annotated[
        Literal["nearest", "random"],
        typer.Option(help="Take the nearest, or any up to --max-rank, such as a reranker will see."),
    ] = "nearest",
    together: Annotated[bool, typer.Option(help="Take candidates from all sets, not only the pair's own.")] = False,
    judge: Annotated[
        str | None, typer.Option(help="A second model that keeps out false negatives and writes soft labels.")
    ] = None,
    judge_kind: Annotated[
        Literal["embedder", "reranker"], typer.Option(help="Score by cosines, or by reading each pair together.")
    ] = "embedder",
    judged: Annotated[int, typer.Option(min=1, help="Number of nearest candidates that the judge scores.")] = 20,
    judge_margin: Annotated[
        float, typer.Option(help="The judge's score of a negative is at least this far below the positive's.")
    ] = 0.0,
    engine: Annotated[
        str, typer.Option(help="local, or ray: encode and compare on the actors of a Ray cluster.")
    ] = "local",
    workers: WorkersOption = 2,
    gpus: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Find hard negatives in training sets with a model, and write the sets with them.

    Example: vlm2vec mine compact data/train -o data/mined --num 3
    """
    from vlm2vec.distributed.cluster import RayPool
    from vlm2vec.distributed.ray_mine import ray_finder
    from vlm2vec.training.judging import JUDGES
    from vlm2vec.training.mining import mine as run_mining
    from vlm2vec.training.nearest import MiningRule

    if margin is None and judge is None:
        margin = 0.0
    rule = MiningRule(num, skip, max_rank, margin, judged, judge_margin, pick)
    judging = None if judge is None else JUDGES[judge_kind](judge)
    pool = RayPool(model, workers, address, gpus)
    with ray_finder(pool) if check_engine(engine) else nullcontext(None) as finder:
        means = run_mining(model, data, output, rule, sets or (), judging, together, finder)
    for name, mean in means.items():
        say(f"{name}: {mean:.2f} negatives for each pair")
    say(f"Sets with negatives: {output}\nNext: vlm2vec train RECIPE.yaml data.root={output}")


def merge(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN[=WEIGHT]...", help="Two or more models of one base; default weight: 1.")
    ],
    output: OutputOption,
    method: Annotated[
        str, typer.Option(help="linear: the mean of the weights; spherical: along the arc between them (SLERP).")
    ] = "linear",
) -> None:
    """Merge several models of one base into a new model, by a weighted mean of their weights.

    Example: vlm2vec merge runs/a=0.7 runs/b=0.3 -o runs/merged
    """
    from vlm2vec.models.checkpoints.merging import merge as run_merge
    from vlm2vec.models.checkpoints.merging import parse_run

    folder = run_merge([parse_run(run) for run in runs], output, method)
    say(f"Merged model: {folder}\nNext: vlm2vec eval {folder} --benchmark BENCHMARK.yaml -o {folder}/eval")
