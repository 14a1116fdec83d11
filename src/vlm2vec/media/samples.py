"""Twelve photographs that ship with the package, to try a command or the first lines of Python without own images."""

from __future__ import annotations

import shutil
from pathlib import Path

from vlm2vec.errors import UserError

FOLDER = Path(__file__).parent / "photographs"
CREDITS = FOLDER / "CREDITS.md"


def sample_photographs() -> list[Path]:
    """Paths of the photographs, by name; `CREDITS` names author and license of each."""
    return sorted(FOLDER.glob("*.jpg"))


def copy_photographs(folder: Path) -> int:
    """Copies the photographs into a folder, which is created if needed.

    Returns:
        Number of photographs.

    Raises:
        UserError: if the folder is not empty, so that no file is replaced.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not an empty folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    photographs = sample_photographs()
    for path in photographs:
        shutil.copyfile(path, folder / path.name)
    return len(photographs)
