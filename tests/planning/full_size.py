"""The shipped recipes of published models whose heads name GPUs."""

from __future__ import annotations

from vlm2vec.training.config import load_recipe
from vlm2vec.training.recipes import find_recipe, shipped_recipes

RECIPES = {name: load_recipe(find_recipe(name)) for name in shipped_recipes()}
FULL_SIZE = [name for name, recipe in RECIPES.items() if recipe.task == "embed" and "/" in recipe.model.base]
