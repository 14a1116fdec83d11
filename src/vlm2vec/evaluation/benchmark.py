"""A benchmark is a YAML file: its tasks as rows of facts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm2vec.errors import UserError
from vlm2vec.evaluation.metrics import META_TASKS, MODALITIES, TASK_METRICS


class EvalTask(BaseModel):
    """One task of a benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    meta_task: Literal[META_TASKS]  # type: ignore[valid-type]
    split: Literal["ind", "ood"] | None = None
    metric: Literal[TASK_METRICS]  # type: ignore[valid-type]
    modality: Literal[MODALITIES] = "image"  # type: ignore[valid-type]
    scope: Literal["local", "global"] = "local"
    num_queries: int | None = None
    num_candidates: int | None = None
    source: str | None = None
    revision: str | None = None


class Source(BaseModel):
    """Folders of the data, relative to the benchmark file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str | None = None
    eval: str


class Benchmark(BaseModel):
    """All tasks and where their data lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tasks: list[EvalTask]
    source: Source | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What a report says of the data."""
        revisions = sorted({f"{task.source}@{task.revision or 'unrecorded'}" for task in self.tasks if task.source})
        return {"data_revision": ", ".join(revisions) or "local files"}


def load_benchmark(path: str | Path, data: Path | None = None) -> tuple[Benchmark, Path]:
    """Reads a benchmark file.

    Args:
        path: The YAML file.
        data: Folder of the evaluation sets; None: as the file says, relative to it.

    Returns:
        The benchmark and the folder of its evaluation sets.

    Raises:
        UserError: for a missing or invalid file, or if no data folder is known.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such benchmark file; give the path of a benchmark's YAML file")
    try:
        benchmark = Benchmark.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path}: {field}: {first['msg']}") from error
    if data is None and benchmark.source is None:
        raise UserError(f"{path}: names no data folder; add `source: {{eval: FOLDER}}` or give --data FOLDER")
    folder = data or path.parent / benchmark.source.eval  # type: ignore[union-attr]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data folder of benchmark {benchmark.name}; give it with --data FOLDER")
    return benchmark, folder
