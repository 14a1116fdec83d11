"""Runs two steps of a recipe on a tiny random model of its family, without downloads."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm2vec.models.registry import KNOWN
from vlm2vec.models.transformers_internals import without_progress_bars
from vlm2vec.training.config import Recipe
from vlm2vec.training.made_sets import make_set
from vlm2vec.training.run import read_log, train
from vlm2vec.training.tiny import write_tiny

STEPS, PAIRS = 2, 8
FEW_PIXELS = {"min_pixels", "max_pixels", "num_crops", "image_grid_pinpoints", "size"}  # of real image processors


def dry_run(recipe: Recipe) -> list[dict[str, float]]:
    """Runs 2 steps of 8 pairs with a tiny model and returns the log.

    The base is replaced by a tiny random model of `model.family` (a built-in base is used as it is), and a missing data
    folder by a few generated pairs per set. All other settings are those of the recipe.

    Raises:
        UserError: for an error in the recipe, or a family without a tiny model.
    """
    with tempfile.TemporaryDirectory() as name, without_progress_bars(), _only_errors("vlm2vec.models.loading"):
        return read_log(train(_in_small(recipe, Path(name))))


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Keeps warnings about the tiny model, such as that it is not a published one, out of the output."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _in_small(recipe: Recipe, folder: Path) -> Recipe:
    values = recipe.model_dump()
    if recipe.model.base not in KNOWN:
        (folder / "base").mkdir()
        write_tiny(recipe.model.family or "", folder / "base")
        kept = {key: value for key, value in recipe.model.options.items() if key not in FEW_PIXELS}
        values["model"] |= {"base": str(folder / "base"), "revision": None, "options": kept}
        if recipe.task == "rerank":  # of a tiny tokenizer, only letters are tokens
            values["rerank"]["prompt"]["answers"] = ("y", "n")
    if not recipe.data.root.is_dir():
        values["data"]["root"] = folder / "data"
        for set_name in recipe.data.sets or ["Made"]:
            make_set(folder / "data", set_name, PAIRS)
    values["data"] |= {"max_pairs": 4 * PAIRS, "sub_batch_size": PAIRS // 2, "num_workers": 0}
    values["train"] |= {"steps": STEPS, "warmup_steps": 0, "batch_size": PAIRS, "log_steps": 1, "save_steps": STEPS}
    values["train"] |= {"report_to": [], "reuse_vision": "step" if recipe.train.reuse_vision != "no" else "no"}
    return Recipe.model_validate(values | {"evaluate": None, "output": folder / "run"})
