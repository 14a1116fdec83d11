"""`vlm2vec data check` and `vlm2vec data fetch`: what of a benchmark's data is there, and how to get the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from vlm2vec.data.mmeb.gui import gui_files
from vlm2vec.data.mmeb.video_rows import form_of, row_files
from vlm2vec.data.records import record_files
from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import REVISIONS_FILE, Benchmark, EvalTask, read_revisions
from vlm2vec.evaluation.evaluate import distinct_inputs, images_of
from vlm2vec.evaluation.tasks import read_task, wrong_counts
from vlm2vec.files import write_json

EXAMPLES = 3


@dataclass(frozen=True)
class TaskCheck:
    """What of one task is there."""

    task: EvalTask
    status: str
    """"ready", "rows missing", "images missing", "wrong counts", "unreadable" or "no reader"."""
    detail: str
    num_queries: int = 0
    num_inputs: int = 0
    num_images: int = 0
    num_missing: int = 0
    num_bytes: int = 0
    """Of the rows' files; images lie in archives that tasks share."""
    form: str = ""
    """How the rows are stored, such as "jsonl, test.jsonl"."""


def check_data(
    benchmark: Benchmark, folder: Path, progress: Callable[[int], None] = lambda done: None
) -> list[TaskCheck]:
    """Reads every task's rows and looks for its images; no image is decoded and no model loaded."""
    checks = []
    for task in benchmark.tasks:
        checks.append(_check(task, folder, benchmark))
        progress(1)
    return checks


def how_to_get(task: EvalTask, benchmark_name: str, folder: Path) -> str:
    """One line that says where a task's data comes from."""
    if task.source is None:
        return "local data: put its files there"
    files = f", images {', '.join(task.media_files)} of {task.media_source}" if task.media_files else ""
    command = f"vlm2vec data fetch {benchmark_name} --data {folder} --task {task.name!r}"
    return f"rows from {task.source}{f' ({task.config})' if task.config else ''}{files}: {command}"


def fetch_task(task: EvalTask, folder: Path, download: Callable[..., str], media: bool = True) -> dict[str, str]:
    """Downloads one task's rows (and its images) into the data folder and records the revisions.

    Args:
        task: With a source on the hub.
        folder: The data folder.
        download: `huggingface_hub.snapshot_download`, or what has its arguments.
        media: Also the archives of images, which tasks share.

    Returns:
        Revision by dataset, as recorded in `revisions.json`.

    Raises:
        UserError: for a task without source, or if another revision of a dataset is already recorded there.
    """
    if task.source is None:
        raise UserError(f"{task.name}: its data is local, nothing can be fetched")
    recorded = read_revisions(folder)
    wanted = task.revision or recorded.get(task.source)
    # Repositories with a folder a set, or files of many sets, keep their layout; the others are one set.
    place = folder if task.files is not None or task.reader in ("mmeb", "gui") else folder / task.name
    found = {task.source: _snapshot(download, task.source, wanted, place, _row_patterns(task))}
    if media and task.media_source and task.media_files:
        pinned = recorded.get(task.media_source, found.get(task.media_source))
        found[task.media_source] = _snapshot(download, task.media_source, pinned, folder, task.media_files)
    for name, revision in found.items():
        if recorded.get(name, revision) != revision:
            raise UserError(f"{folder}: holds {name} at {recorded[name]}, not {revision}; use another folder")
    write_json(folder / REVISIONS_FILE, dict(sorted({**recorded, **found}.items())))
    return found


def _snapshot(
    download: Callable[..., str], repo: str, revision: str | None, place: Path, patterns: list[str] | None
) -> str:
    """Downloads files of a dataset; returns the commit that they are of."""
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        commit = revision or str(HfApi().dataset_info(repo).sha)
        download(repo_id=repo, repo_type="dataset", revision=commit, local_dir=str(place), allow_patterns=patterns)
    return commit


def download_size(tasks: Iterable[EvalTask], media: bool = True) -> tuple[int, int]:
    """Number of files and of bytes on the hub that `fetch_task` would download; a file that tasks share counts once.

    Args:
        tasks: Tasks without a source on the hub are left out.
        media: Also the archives of images.

    Raises:
        UserError: if the hub cannot be reached.
    """
    wanted: dict[str, list[list[str] | None]] = defaultdict(list)
    for task in tasks:
        if task.source:
            wanted[task.source].append(_row_patterns(task))
        if media and task.media_source and task.media_files:
            wanted[task.media_source].append(task.media_files)
    sizes = [size for repo, patterns in wanted.items() for size in _sizes(repo, patterns)]
    return len(sizes), sum(sizes)


def _sizes(repo: str, wanted: list[list[str] | None]) -> list[int]:
    """Sizes of the files of a dataset that match any pattern; None among the patterns: of all its files."""
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        files = HfApi().dataset_info(repo, files_metadata=True).siblings or []
    patterns = ["*"] if None in wanted else [pattern for some in wanted for pattern in some or []]
    return [file.size or 0 for file in files if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line; its HTTP library, and so its errors, differ by version."""
    try:
        yield
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repo}: could not be fetched from the hub ({first_line})") from error


def _row_patterns(task: EvalTask) -> list[str] | None:
    if task.files is not None:
        return list(task.files.values())
    if task.reader == "mmeb":
        return [f"{task.config or task.name}/*"]
    if task.reader == "gui":
        return [f"gui*tasks/{task.config}/*"]
    return [f"*{task.config}*"] if task.config else None


def _row_files(task: EvalTask, folder: Path) -> list[Path]:
    """The files of a task's rows that are there."""
    if task.files is not None:
        return [folder / name for name in task.files.values() if (folder / name).is_file()]
    if task.reader == "records":
        return record_files(folder / task.name)
    if task.reader == "video":
        return row_files(folder / task.name, task.hub_split)
    if task.reader == "gui":
        parts = ("queries", "corpus")
        found = [gui_files(folder, task.config or "", part, task.hub_split or "") for part in parts]
        return [file for files in found for file in files] if all(found) else []
    return sorted(path for path in (folder / task.name).rglob("*.*") if path.suffix in (".parquet", ".jsonl", ".tar"))


def _check(task: EvalTask, folder: Path, benchmark: Benchmark) -> TaskCheck:
    if task.reader is None:
        return TaskCheck(task, "no reader", task.note or "its layout is not settled publicly")
    try:
        files = _row_files(task, folder)
    except UserError as error:
        return TaskCheck(task, "unreadable", str(error))
    size, form = sum(path.stat().st_size for path in files), form_of(files)
    if not files:
        return TaskCheck(task, "rows missing", how_to_get(task, benchmark.name, folder))
    try:
        queries = read_task(task, folder, benchmark.quirks)
        images = list(dict.fromkeys(images_of({task.name: queries})))
        missing = [image for image in images if not image.exists()]
    except UserError as error:
        return TaskCheck(task, "unreadable", str(error), num_bytes=size, form=form)
    status, detail = "ready", "; ".join(wrong_counts(task, queries))
    if detail:
        status = "wrong counts"
    if missing:
        names = ", ".join(str(image.member or image.path) for image in missing[:EXAMPLES])
        status = "images missing"
        detail = f"{len(missing)} of {len(images)}, such as {names}; {how_to_get(task, benchmark.name, folder)}"
    counts = {
        "num_queries": len(queries),
        "num_inputs": len(distinct_inputs(queries)),
        "num_images": len(images),
        "num_missing": len(missing),
        "num_bytes": size,
    }
    return TaskCheck(task, status, detail, **counts, form=form)
