"""Checks whether a new run can use an output folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.training.trainer_internals import step_checkpoints

CHECKPOINTS = "checkpoints"
HISTORY_FILE = "evaluations.json"
BEFORE_FIRST_CHECKPOINT = {CHECKPOINTS, HISTORY_FILE, "best"}
"""Files that a run writes before its first step checkpoint; a run that left only these cannot be resumed."""


def check_new(output: Path) -> None:
    """Checks that a new run can use the folder, and removes the remains of a run without a checkpoint.

    Raises:
        UserError: if the folder contains a run, or files that do not belong to a run.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; choose another output")
    names = {path.name for path in output.iterdir()}
    if names - BEFORE_FIRST_CHECKPOINT or step_checkpoints(output / CHECKPOINTS):
        raise UserError(f"{output}: already holds a run; choose another output, delete it, or resume it with --resume")
    shutil.rmtree(output)


def read_history(output: Path) -> list[dict[str, Any]]:
    """Reads the evaluations during a run: step, group means and score by task; empty if there are none."""
    file = output / HISTORY_FILE
    history: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return history
