"""The folder of a run: when a new run may use it."""

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
"""What a run writes before its first step checkpoint: a start that failed leaves no more, and cannot be resumed."""


def check_new(output: Path) -> None:
    """Makes sure that a new run can use the folder; what a failed start left there is removed.

    Raises:
        UserError: if the folder holds a run, or files that no run writes.
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
    """The evaluations during a run: step, group means, score by task; empty if there are none."""
    file = output / HISTORY_FILE
    history: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return history
