"""Checks a resumed run: settings that define the trained weights must not change; other changes are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.files import read_object
from vlm2vec.training.config import Recipe, load_recipe
from vlm2vec.training.trainer_internals import PAIRS_FILE, RECIPE_FILE

FIXED = ("model", "lora", "loss.kind", "loss.learn_temperature", "loss.learn_bias", "train.ema_decay")
"""Sections and keys that must not change, since the checkpoint lacks the weights or state for a new value."""
FREE = ("model.gradient_checkpointing", "lora.dropout")
"""Keys below `FIXED` that may nevertheless change."""
DATA_ORDER = ("data", "train.batch_size", "train.seed")
"""Keys that determine the examples in the batch of a step."""
ORDER = "this changes the order of the examples: some may be seen twice, others not at all"
IGNORED = ("output", "train.log_steps", "train.save_steps", "train.report_to")
"""Keys whose changes are not reported."""


def check_resume(checkpoint: Path, recipe: Recipe) -> list[str]:
    """Compares a recipe with that of a step checkpoint.

    Args:
        checkpoint: Folder of the step checkpoint. Checkpoints of earlier versions without a recipe are not checked.
        recipe: Recipe of the resumed run.

    Returns:
        The changes as `key before -> after`, and their consequences.

    Raises:
        UserError: if a setting changed that must not change, or if the checkpoint has no steps left.
    """
    done = int(checkpoint.name.split("-")[1])
    if done > recipe.train.steps:
        raise UserError(
            f"{checkpoint}: already trained for {done} steps, train.steps is {recipe.train.steps}; raise train.steps"
        )
    if not (checkpoint / RECIPE_FILE).is_file():
        return []
    before, after = (_flat(each.model_dump(mode="json")) for each in (load_recipe(checkpoint / RECIPE_FILE), recipe))
    changed = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key) and not _is_below(key, IGNORED)
    )
    lines = [f"{key} {before.get(key)} -> {after.get(key)}" for key in changed]
    fixed = [line for key, line in zip(changed, lines, strict=True) if _is_fixed(key)]
    if fixed:
        raise UserError(
            f"{checkpoint}: cannot resume with {', '.join(fixed)}; restore the earlier values, or train into another "
            "output folder"
        )
    if any(_is_below(key, DATA_ORDER) for key in changed):
        lines.append(ORDER)
    return lines


def changed_pairs(checkpoint: Path, sets: Mapping[str, Sized]) -> list[str]:
    """Returns the sets whose number of pairs is no longer that of a step checkpoint, and the consequence.

    Args:
        checkpoint: Folder of the step checkpoint. Those of earlier versions, without these numbers, are not checked.
        sets: Pairs by set name, now.
    """
    before = read_object(checkpoint / PAIRS_FILE)
    lines = [
        f"{name} had {before[name]} pairs and has {len(pairs)}"
        for name, pairs in sets.items()
        if before.get(name, len(pairs)) != len(pairs)
    ]
    return [*lines, ORDER] if lines else []


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted keys."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _is_below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _is_fixed(key: str) -> bool:
    return _is_below(key, FIXED) and not _is_below(key, FREE)
