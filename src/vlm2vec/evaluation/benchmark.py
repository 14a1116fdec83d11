"""A benchmark is a YAML file with a row of facts for each task. Three ship in the package; any path works.

The smallest file of one's own, with the records in `data/Beach.jsonl` (`vlm2vec.data.records`):

    name: mine
    source: {eval: data}
    tasks: {Beach: {reader: records}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlm2vec.data.mmeb.corpora import Part
from vlm2vec.data.mmeb.instruct import Kind
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.errors import UserError, did_you_mean, expected_in, field_of
from vlm2vec.evaluation.metrics import META_TASKS, MODALITIES, TASK_METRICS
from vlm2vec.files import read_yaml

SHIPPED = Path(__file__).with_name("benchmarks")
REVISIONS_FILE = "revisions.json"
EXAMPLE = "{name: mine, source: {eval: FOLDER}, tasks: {Beach: {reader: records}}}"
MAX_PROBLEMS = 5


class EvalTask(BaseModel):
    """One task of a benchmark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    meta_task: Literal[META_TASKS] = "retrieval"  # type: ignore[valid-type]
    modality: Literal[MODALITIES] = "image"  # type: ignore[valid-type]
    split: Literal["ind", "ood"] | None = None
    metric: Literal[TASK_METRICS] = "hit@1"  # type: ignore[valid-type]
    scope: Literal["local", "global"] = "local"
    """Candidates of a query: its own, or those of the whole set."""
    num_queries: int | None = None
    num_candidates: int | None = None
    """The largest number of candidates of a query; None: not stated, or different between published versions."""
    reader: str | None = "mmeb"
    """The layout of the rows (`tasks.READERS`); None: not published, and the task cannot be scored yet."""
    kind: Kind | None = None
    """The reference loader whose prompts the set has, where instructions are stored apart from the rows."""
    language: str | None = None
    query: str | None = None
    """Modalities of the query side: T text, I image, V video, A audio."""
    target: str | None = None
    instruction: str | None = None
    """Instruction of the query side, for readers of this file; rows carry their own."""
    target_instruction: str | None = None
    source: str | None = None
    """Hub dataset that has the rows."""
    config: str | None = None
    hub_split: str | None = None
    revision: str | None = None
    """None: resolved when the data is fetched and recorded in the data folder's revisions.json."""
    files: dict[Part, str] | None = None
    """Paths of the rows' files, equal in the source and below the data folder; None: in a folder of the task's name."""
    media_source: str | None = None
    media_files: list[str] | None = None
    licence: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _files_for_their_reader(self) -> EvalTask:
        if self.reader == "corpus" and not {"queries", "corpus"} <= set(self.files or {}):
            raise ValueError(
                f"{self.name}: reader corpus needs files: {{queries, corpus}}, and qrels if in a separate file"
            )
        return self


class Source(BaseModel):
    """Folders of the data, relative to the benchmark file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str | None = None
    eval: str


class Benchmark(BaseModel):
    """All tasks and the folder of their data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    extends: str | None = None
    """A shipped benchmark whose tasks come first."""
    tasks: list[EvalTask] = Field(min_length=1)
    source: Source | None = None
    quirks: Quirks = Quirks()

    @field_validator("tasks", mode="before")
    @classmethod
    def _rows(cls, tasks: Any) -> Any:
        """A mapping of names to facts is read as a list of facts with a `name`."""
        if not isinstance(tasks, dict):
            return tasks
        return [{"name": name, **facts} if isinstance(facts, dict) else facts for name, facts in tasks.items()]

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
            raise UserError(
                f"switch {field_of(first['loc'])}: {expected_in(first['msg'])}; there are: {known}"
            ) from error

    def only(self, names: Sequence[str]) -> Benchmark:
        """The benchmark with some of its tasks, in its order.

        Raises:
            UserError: for an unknown task.
        """
        known = [task.name for task in self.tasks]
        for name in names:
            if name not in known:
                near = did_you_mean(name, known) or "."
                raise UserError(f"{name}: no such task in {self.name}{near} Known tasks: {', '.join(known)}")
        return self.model_copy(update={"tasks": [task for task in self.tasks if task.name in names]})

    def to_score(self, names: Sequence[str] | None = None) -> Benchmark:
        """The benchmark with the tasks to score.

        Args:
            names: Tasks; None or empty: every task that has a reader.

        Raises:
            UserError: for an unknown task, or if no task has a reader.
        """
        chosen = self.only(names or [task.name for task in self.tasks if task.reader])
        if not any(task.reader for task in chosen.tasks):
            tasks = ", ".join(task.name for task in (chosen.tasks or self.tasks))
            raise UserError(
                f"{self.name}: nothing to score: {tasks} have `reader: null`; set a reader, such as records"
            )
        return chosen


def shipped_benchmarks() -> list[str]:
    """Names of the benchmarks in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_benchmark(name: str | Path, extended_by: tuple[Path, ...] = ()) -> tuple[Benchmark, Path]:
    """A shipped benchmark by name, or one of a YAML file.

    Args:
        name: Of the benchmark, or its file.
        extended_by: Files that extend it, the first one first; none of them may be extended again.

    Returns:
        The benchmark, with the tasks of what it extends, and its file.

    Raises:
        UserError: for a missing or invalid file, or one that extends itself.
    """
    shipped = SHIPPED / f"{name}.yaml"
    path = shipped if shipped.is_file() and not Path(name).is_file() else Path(name)
    if not path.is_file():
        known = shipped_benchmarks()
        near = did_you_mean(Path(name).stem, known) or "."
        raise UserError(f"{path}: no such benchmark file{near} Give a YAML file or one of {', '.join(known)}")
    try:
        benchmark = Benchmark.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {_problems(error)}") from error
    if benchmark.extends:
        files = (*extended_by, path.resolve())
        if len(set(files)) < len(files):
            raise UserError(f"{path}: extends itself: {' > '.join(file.name for file in files)}")
        first_tasks = read_benchmark(benchmark.extends, files)[0].tasks
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
    fetch = (
        f"; download it with: vlm2vec data fetch {name} --data FOLDER (--size: how much; --task NAME: a single task)"
    )
    how = fetch if any(task.source for task in benchmark.tasks) else ""
    if data is None and benchmark.source is None:
        where = "give its data with --data FOLDER" if how else "add `source: {eval: FOLDER}` or give --data FOLDER"
        raise UserError(f"{name}: names no data folder; {where}{how}")
    folder = data or path.parent / benchmark.source.eval  # type: ignore[union-attr]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data folder of benchmark {benchmark.name}; give --data FOLDER{how}")
    return benchmark, folder


def _problems(error: ValidationError) -> str:
    """Every wrong field, up to `MAX_PROBLEMS`; an example where fields are missing."""
    found = error.errors()
    lines = []
    for problem in found[:MAX_PROBLEMS]:
        field = field_of(problem["loc"]) or "content"
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {field}{did_you_mean(str(problem['loc'][-1]), _keys(problem['loc']))}")
        else:
            lines.append(f"{field}: {expected_in(problem['msg'])}")
    more = f" and {len(found) - MAX_PROBLEMS} more problems" if len(found) > MAX_PROBLEMS else ""
    missing = any(problem["type"] in ("missing", "model_type") for problem in found)
    return "; ".join(lines) + more + (f"; the smallest benchmark: {EXAMPLE}" if missing else "")


def _keys(location: tuple[int | str, ...]) -> Sequence[str]:
    """The keys that are valid beside the one at `location`."""
    sections: dict[object, type[BaseModel]] = {"tasks": EvalTask, "source": Source, "quirks": Quirks}
    section = sections.get(location[0], Benchmark) if len(location) > 1 else Benchmark
    return list(section.model_fields)


def read_revisions(folder: Path) -> dict[str, str]:
    """Revision by hub dataset in a data folder, as recorded by `vlm2vec data fetch`."""
    file = folder / REVISIONS_FILE
    if not file.is_file():
        return {}
    try:
        return {str(name): str(revision) for name, revision in json.loads(file.read_text()).items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{file}: not a JSON object of revisions by dataset ({error})") from error
