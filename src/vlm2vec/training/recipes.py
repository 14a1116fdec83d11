"""Finds the recipes that ship with the package."""

from __future__ import annotations

from pathlib import Path

from vlm2vec.data.pair_tables import TABLES
from vlm2vec.errors import UserError, did_you_mean
from vlm2vec.models.checkpoints.replaced import refuse_replaced

_PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path:
    """Returns the folder of the shipped recipes: in the installed package, or in the clone if installed editable."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "recipes"


def shipped_recipes() -> dict[str, str]:
    """Returns name and summary (first comment line) of each shipped recipe."""
    return {path.stem: _summary(path) for path in sorted(recipes_folder().glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str | Path) -> Path:
    """Returns the file of a recipe, given a path or the name of a shipped recipe with or without `.yaml`.

    Args:
        name: An existing file takes precedence over a shipped recipe with this name.

    Raises:
        UserError: if neither exists (the message lists the shipped recipes), or the file does not end in .yaml.
    """
    if Path(name).is_file():
        if Path(name).suffix.lower() not in (".yaml", ".yml"):
            raise UserError(f"{name}: expected a recipe (.yaml) or a file of pairs ({', '.join(TABLES)})")
        return Path(name)
    shipped = recipes_folder() / f"{str(name).removesuffix('.yaml')}.yaml"
    if shipped.is_file() and Path(name).name == str(name):
        return shipped
    refuse_replaced(str(name).removesuffix(".yaml"))
    known = list(shipped_recipes())
    near = did_you_mean(Path(name).stem, known) or "."
    raise UserError(f"{name}: no such recipe{near} Give a YAML file or the name of a recipe: {', '.join(known)}")


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next(lines).removeprefix("#").strip()
