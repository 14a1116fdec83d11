"""Commands that train: demo, train, recipes, mine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm2vec.cli.options import OutputOption
from vlm2vec.cli.plan import verdict_for
from vlm2vec.errors import UserError
from vlm2vec.progress import say


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
    recipe: Annotated[str, typer.Argument(help="A YAML file or a shipped recipe; `vlm2vec recipes` lists them.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as train.steps=100.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last step checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Two steps on a tiny random model of the same family.")] = False,
    anyway: Annotated[
        bool, typer.Option(help="Start even if the plan says that the GPU's memory is too small.")
    ] = False,
) -> None:
    """Train an embedding model by a recipe."""
    from vlm2vec.training.config import dump_recipe, load_recipe
    from vlm2vec.training.recipes import find_recipe
    from vlm2vec.training.run import train as run_train

    settings = load_recipe(find_recipe(recipe), overrides or [])
    say(dump_recipe(settings))
    if dry_run:
        from vlm2vec.training.dry_run import dry_run as run_dry

        losses = ", ".join(f"{entry['loss']:.3f}" for entry in run_dry(settings))
        say(f"Dry run: losses {losses}; the recipe builds. Next: vlm2vec train {recipe}")
        return
    if found := verdict_for(settings):
        say(found[0])
        if not (found[1] or anyway):
            raise UserError(f"{recipe}: the GPU's memory is too small; change a setting above, or add --anyway")
    monitor = None
    if settings.evaluate is not None:
        from vlm2vec.monitor import Monitor

        monitor = Monitor(settings)
    folder = run_train(settings, resume=resume, monitor=monitor)
    say(f"Trained model: {folder}\nNext: vlm2vec eval {folder} --benchmark BENCHMARK.yaml -o {folder}/eval")


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
    margin: Annotated[float, typer.Option(help="A negative's cosine is at least this far below the positive's.")] = 0.0,
) -> None:
    """Find hard negatives in training sets with a model, and write the sets with them.

    Example: vlm2vec mine compact-embed data/train -o data/mined --num 3
    """
    from vlm2vec.training.mining import MiningRule
    from vlm2vec.training.mining import mine as run_mining

    rule = MiningRule(num, skip, max_rank, margin)
    for name, mean in run_mining(model, data, output, rule, sets or ()).items():
        say(f"{name}: {mean:.2f} negatives for each pair")
    say(f"Sets with negatives: {output}\nNext: vlm2vec train RECIPE.yaml data.root={output}")
