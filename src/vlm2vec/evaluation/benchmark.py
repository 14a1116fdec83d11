"""A benchmark is a YAML file: its tasks as rows of facts. Three ship in the package; any path works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm2vec.data.mmeb.corpora import Part
from vlm2vec.data.mmeb.instruct import Kind
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.errors import UserError
from vlm2vec.evaluation.metrics import META_TASKS, MODALITIES, TASK_METRICS

SHIPPED = Path(__file__).with_name("benchmarks")
REVISIONS_FILE = "revisions.json"


class EvalTask(BaseModel):
    """One task of a benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    meta_task: Literal[META_TASKS]  # type: ignore[valid-type]
    modality: Literal[MODALITIES] = "image"  # type: ignore[valid-type]
    split: Literal["ind", "ood"] | None = None
    metric: Literal[TASK_METRICS] | None = None  # type: ignore[valid-type]
    """None: not settled; such a task has no reader."""
    scope: Literal["local", "global"] = "local"
    """Candidates of each query: its own, or those of the whole set."""
    num_queries: int | None = None
    num_candidates: int | None = None
    """The most of a query; None: not stated or not the same in all versions."""
    reader: str | None = "mmeb"
    kind: Kind | None = None
    """Which reference loader's prompts the set has, for the layout with instructions apart."""
    language: str | None = None
    query: str | None = None
    """What the query side is of: T text, I image, V video, A audio."""
    target: str | None = None
    instruction: str | None = None
    """Of the query side, for people; rows carry their own."""
    target_instruction: str | None = None
    source: str | None = None
    """Hub dataset of the rows."""
    config: str | None = None
    hub_split: str | None = None
    revision: str | None = None
    """None: resolved at first use and recorded in the data folder's revisions.json."""
    files: dict[Part, str] | None = None
    """Of the rows, at the same place in the source and below the data folder; None: in a folder of the task's name."""
    media_source: str | None = None
    media_files: list[str] | None = None
    licence: str | None = None
    note: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _unsettled(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("metric") is None:
            values = {**values, "reader": None}
        return values

    @model_validator(mode="after")
    def _files_for_their_reader(self) -> EvalTask:
        if self.reader == "corpus" and not {"queries", "corpus"} <= set(self.files or {}):
            raise ValueError(
                f"{self.name}: reader corpus needs files: {{queries, corpus}}, and qrels where they lie apart"
            )
        return self


class Source(BaseModel):
    """Folders of the data, relative to the benchmark file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str | None = None
    eval: str


class Benchmark(BaseModel):
    """All tasks and where their data lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    extends: str | None = None
    """A shipped benchmark whose tasks come first."""
    tasks: list[EvalTask] = Field(min_length=1)
    source: Source | None = None
    quirks: Quirks = Quirks()

    def facts(self, folder: Path) -> dict[str, str]:
        """What a report says of the data.

        Args:
            folder: The data folder, whose `revisions.json` says what was fetched.
        """
        recorded = read_revisions(folder)
        revisions = {
            f"{task.source}@{task.revision or recorded.get(task.source, 'not recorded')}"
            for task in self.tasks
            if task.source is not None
        }
        quirks = ", ".join(f"{name} {value}" for name, value in self.quirks.model_dump().items())
        return {"data_revision": ", ".join(sorted(revisions)) or "local files", "data_switches": quirks}

    def with_switches(self, switches: dict[str, Any]) -> Benchmark:
        """The benchmark with some of its `quirks` changed.

        Raises:
            UserError: for an unknown switch or value.
        """
        try:
            return self.model_copy(update={"quirks": Quirks.model_validate({**self.quirks.model_dump(), **switches})})
        except ValidationError as error:
            first = error.errors()[0]
            known = ", ".join(Quirks.model_fields)
            raise UserError(f"switch {'.'.join(map(str, first['loc']))}: {first['msg']}; there are: {known}") from error

    def only(self, names: list[str]) -> Benchmark:
        """The benchmark with some of its tasks, in its order.

        Raises:
            UserError: for a name that is no task.
        """
        known = [task.name for task in self.tasks]
        for name in names:
            if name not in known:
                raise UserError(f"{name}: no such task in {self.name}; there are: {', '.join(known)}")
        return self.model_copy(update={"tasks": [task for task in self.tasks if task.name in names]})


def shipped_benchmarks() -> list[str]:
    """Names of the benchmarks in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_benchmark(name: str | Path) -> tuple[Benchmark, Path]:
    """A shipped benchmark by name, or one of a YAML file.

    Returns:
        The benchmark, with the tasks of what it extends, and its file.

    Raises:
        UserError: for a missing or invalid file.
    """
    shipped = SHIPPED / f"{name}.yaml"
    path = shipped if shipped.is_file() and not Path(name).is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(shipped_benchmarks())
        raise UserError(f"{path}: no such benchmark file; give the path of a benchmark's YAML file, or one of {known}")
    try:
        benchmark = Benchmark.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path}: {field}: {first['msg']}") from error
    if benchmark.extends:
        first_tasks = read_benchmark(benchmark.extends)[0].tasks
        benchmark = benchmark.model_copy(update={"tasks": [*first_tasks, *benchmark.tasks]})
    return benchmark, path


def load_benchmark(name: str | Path, data: Path | None = None) -> tuple[Benchmark, Path]:
    """A benchmark and the folder of its evaluation sets.

    Args:
        name: A shipped benchmark's name or the path of a YAML file.
        data: Folder of the evaluation sets; None: as the file says, relative to it.

    Raises:
        UserError: for a missing or invalid file, or if no data folder is known.
    """
    benchmark, path = read_benchmark(name)
    if data is None and benchmark.source is None:
        raise UserError(f"{path}: names no data folder; add `source: {{eval: FOLDER}}` or give --data FOLDER")
    folder = data or path.parent / benchmark.source.eval  # type: ignore[union-attr]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data folder of benchmark {benchmark.name}; give it with --data FOLDER")
    return benchmark, folder


def read_revisions(folder: Path) -> dict[str, str]:
    """Which revision of each hub dataset lies in a data folder, as `vlm2vec data fetch` recorded it."""
    file = folder / REVISIONS_FILE
    if not file.is_file():
        return {}
    try:
        return {str(name): str(revision) for name, revision in json.loads(file.read_text()).items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{file}: not a JSON object of revisions by dataset ({error})") from error
