from __future__ import annotations

from pathlib import Path

import pytest

from vlm2vec import UserError
from vlm2vec.training.config import load_recipe
from vlm2vec.training.dry_run import dry_run
from vlm2vec.training.tiny import BUILDERS

RECIPES = Path(__file__).parents[2] / "recipes"
REAL = [path for path in sorted(RECIPES.glob("*.yaml")) if "family:" in path.read_text()]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_a_recipe_of_a_real_run_does_two_steps_in_small(path: Path) -> None:
    recipe = load_recipe(path, ["train.bf16=false"])
    if recipe.model.family not in BUILDERS:
        pytest.skip(f"no tiny {recipe.model.family}")
    log = dry_run(recipe)
    assert [entry["step"] for entry in log] == [1, 2]
    assert all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in log)


def test_a_family_without_a_tiny_model_is_one_line() -> None:
    recipe = load_recipe(REAL[0], ["model.family=nosuch"])
    with pytest.raises(UserError, match=r"model\.family 'nosuch': dry runs of models"):
        dry_run(recipe)
