"""The demo: prepare a benchmark, train a model and its baseline, and score both on four meta-tasks, in one command."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from vlm2vec.cache import cache_folder
from vlm2vec.data.emoji.prepare import prepare_demo
from vlm2vec.evaluation.comparison import comparison_table
from vlm2vec.evaluation.evaluate import TaskResult, results_json
from vlm2vec.evaluation.report import opening_of, write_html
from vlm2vec.evaluation.run import score_model
from vlm2vec.models.checkpoints.folder import provenance
from vlm2vec.progress import rule, say, stage_bars
from vlm2vec.training.config import Recipe, dump_recipe, load_recipe
from vlm2vec.training.output import CHECKPOINTS
from vlm2vec.training.recipes import find_recipe
from vlm2vec.training.run import read_log, train

RUNS = {"dual encoder": ("dual-encoder", "demo-dual"), "VLM2Vec": ("trained", "demo")}


def run_demo(output: Path, fresh: bool = False) -> None:
    """Prepares the benchmark, scores the untrained model, trains both models, scores them, and writes a report.

    Args:
        output: Folder for `untrained`, `dual-encoder`, `trained` and `report.html`.
        fresh: Train again even if a finished run of the same recipe exists.
    """
    since = time.perf_counter()
    rule("1. the demo benchmark")
    root = _prepare()
    recipes = {name: _recipe(shipped, root, output / folder) for name, (folder, shipped) in RUNS.items()}
    rule("2. the built-in model, untrained")
    columns: dict[str, dict[str, Any]] = {}
    results: list[TaskResult] = []
    model = recipes["VLM2Vec"].model
    columns["untrained"], _ = _score(model.base, root, output / "untrained", model.options)
    for step, (name, recipe) in enumerate(recipes.items(), start=3):
        rule(f"{step}. {name}: {recipe.train.steps} steps of {recipe.train.batch_size} pairs")
        _train(recipe, fresh)
        columns[name], results = _score(str(recipe.output), root, recipe.output, {})
    rule("results")
    comparison = comparison_table(columns)
    say(comparison.table)
    say(comparison.remark)
    curves = {name: read_log(recipe.output) for name, recipe in recipes.items()}
    about = provenance(seconds=round(time.perf_counter() - since), seed=recipes["VLM2Vec"].train.seed)
    trained = recipes["VLM2Vec"].output
    write_html(output / "report.html", "vlm2vec demo", columns, results, curves, about, opening_of(str(trained)))
    say(f"\nTook {about['seconds']} s. Report with images: {output / 'report.html'}")
    say(f"Next: vlm2vec eval {trained} --benchmark {root / 'benchmark.yaml'} --output {output / 'again'}")


def _prepare() -> Path:
    with stage_bars() as update:
        return prepare_demo(cache_folder(), progress=update)


def _recipe(name: str, root: Path, output: Path) -> Recipe:
    return load_recipe(find_recipe(name), [f"data.root={root / 'train'}", f"output={output}"])


def _train(recipe: Recipe, fresh: bool) -> None:
    """Trains; resumes an interrupted run of the same recipe, or reuses a finished run and prints that."""
    saved = recipe.output / "recipe.yaml"
    started = recipe.output / CHECKPOINTS / "recipe.yaml"
    same = any(path.is_file() and path.read_text() == dump_recipe(recipe) for path in (saved, started))
    if fresh or not same:
        shutil.rmtree(recipe.output, ignore_errors=True)
    if saved.is_file():
        say(f"{recipe.output}: finished earlier with this recipe; reused (--fresh trains again)")
        return
    train(recipe, resume=recipe.output.exists())


def _score(model: str, root: Path, output: Path, options: dict[str, Any]) -> tuple[dict[str, Any], list[TaskResult]]:
    benchmark, results = score_model(model, root / "benchmark.yaml", output, options=options)
    return results_json(model, benchmark, results), results
