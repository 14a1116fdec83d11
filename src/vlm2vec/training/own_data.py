"""Prepares training on a user's pairs: reads and checks them, holds some out, chooses settings and writes a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vec.data.pairs import BENCHMARK_FILE, SET_NAME, Pairs, describe, hold_out, read_pairs, write_pairs
from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE, read_embedder_file
from vlm2vec.models.checkpoints.replaced import refuse_replaced
from vlm2vec.models.registry import BUILT_IN
from vlm2vec.planning.geometry import config_of
from vlm2vec.training.base_adapter import adapter_settings
from vlm2vec.training.config import Recipe, dump_recipe
from vlm2vec.training.output import check_new

MIN_PAIRS = 4
MIN_TO_HOLD_OUT = 20  # with fewer pairs, a tenth is a single pair, whose score is meaningless
MIN_STEPS, MAX_STEPS, EPOCHS = 60, 2000, 3


@dataclass(frozen=True)
class OwnData:
    """Result of preparing a user's data.

    Attributes:
        recipe: The recipe.
        file: File of the recipe.
        lines: Summary for the terminal.
    """

    recipe: Recipe
    file: Path
    lines: list[str]


def prepare(
    source: Path,
    base: str,
    output: Path,
    query: Sequence[str] = (),
    target: Sequence[str] = (),
    negatives: Sequence[str] = (),
    holdout: float = 0.1,
    resume: bool = False,
) -> OwnData:
    """Reads pairs and writes `OUTPUT.data` with training pairs, held-out pairs, their benchmark and `recipe.yaml`.

    Args:
        source: See `vlm2vec.data.pairs.read_pairs`.
        base: The model to train.
        output: Folder of the run; it is not created here.
        query: Columns of the query; empty: find them by name.
        target: Columns of the target; empty: find them by name.
        negatives: Columns of the negatives; empty: find them by name.
        holdout: Fraction of the pairs to evaluate on before and after training; 0: no evaluation.
        resume: Whether the folder of the run may exist.

    Raises:
        UserError: if the source is not readable, rows are not valid pairs, there are too few pairs, or `output`
            contains a run and `resume` is off.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"--holdout {holdout}: expected a fraction of the pairs, at least 0 and below 1, such as 0.1")
    refuse_replaced(base)
    if not resume:
        check_new(output)
    pairs = read_pairs(source, query, target, negatives)
    train, held = hold_out(pairs, holdout if len(pairs.records) >= MIN_TO_HOLD_OUT else 0.0)
    if len(train) < MIN_PAIRS:
        raise UserError(f"{source}: only {len(train)} training pairs; expected at least {MIN_PAIRS}")
    folder = output.with_name(f"{output.name}.data")
    write_pairs(folder, train, held)
    recipe = Recipe.model_validate(_settings(base, len(train), folder, output, bool(held)))
    file = folder / "recipe.yaml"
    write_text(file, dump_recipe(recipe))
    return OwnData(recipe, file, [*describe(pairs), _about_split(pairs, train, held), f"Recipe: {file}"])


def _about_split(pairs: Pairs, train: Sequence[Any], held: Sequence[Any]) -> str:
    if held:
        return f"Held out: {len(held)} of {len(pairs.records)} pairs, scored before and after; training: {len(train)}"
    return f"Nothing is held out; training: {len(train)} pairs"


def _settings(base: str, num_pairs: int, folder: Path, output: Path, has_held_out: bool) -> dict[str, Any]:
    settings = _by_family(base)
    # The targets of all other pairs in a batch are negatives, so batches are large: up to half of the pairs.
    batch = max(2, min(int(settings["train"]["batch_size"]), num_pairs // 2))
    steps = min(MAX_STEPS, max(MIN_STEPS, EPOCHS * num_pairs // batch))
    train = {**settings["train"], "batch_size": batch, "steps": steps, "warmup_steps": steps // 10, "save_steps": steps}
    evaluate = {"benchmark": str(folder / BENCHMARK_FILE), "every_steps": steps, "at_start": True}
    return {
        "model": settings["model"],
        "lora": adapter_settings(base) or settings["lora"],
        "data": {"root": str(folder / "train"), "sets": [SET_NAME], "batching": "single"},
        "train": train,
        "evaluate": evaluate if has_held_out else None,
        "output": str(output),
    }


def _by_family(base: str) -> dict[str, Any]:
    """Returns model, LoRA and training settings for a base.

    The built-in model uses a temperature of 0.1 and a learning rate of 5e-4 (docs/explain/log.md). With
    the values for large models (2e-5 and 0.02) it learns nothing in a few hundred steps. Other models use the settings
    of VLM2Vec-V2 (arXiv 2507.04590 and the learning rate of its released script).
    """
    if _origin(base) in BUILT_IN:
        return {
            "model": {"base": base},
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
            "train": {"batch_size": 32, "chunk_size": 16, "learning_rate": 5e-4, "temperature": 0.1, "log_steps": 5},
        }
    return {
        "model": {"base": base, "family": _family(base)},
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.1},
        "train": {
            "batch_size": 64,
            "chunk_size": None,
            "chunk_tokens": 8192,
            "learning_rate": 5e-5,
            "temperature": 0.02,
        },
    }


def _origin(base: str) -> str:
    """Returns the base model of a checkpoint folder; any other base is returned unchanged."""
    file = Path(base) / EMBEDDER_FILE
    return read_embedder_file(file.parent).base if file.is_file() else base


def _family(base: str) -> str | None:
    """Returns the `model_type` of a base whose configuration is available locally; only a dry run needs it."""
    try:
        return str(config_of(base)["model_type"])
    except (UserError, KeyError):
        return None
