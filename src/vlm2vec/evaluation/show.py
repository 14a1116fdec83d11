"""`vlm2vec data show`: the inputs of a task as a model reads them. No weights are loaded.

Other evaluators can be compared with this one input by input: prompt bytes, media in order, candidates and gold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark, EvalTask
from vlm2vec.evaluation.prompt_format import PromptFormat
from vlm2vec.evaluation.report_html import Thumbnails
from vlm2vec.evaluation.tasks import read_task
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef
from vlm2vec.types import EmbeddingInput, EvalQuery

TEMPLATE = Path(__file__).with_name("templates") / "show.html.j2"
THUMBNAIL_PIXELS = 160


@dataclass(frozen=True)
class ShownMedia:
    """An image, or a video with its frames.

    Attributes:
        kind: "image" or "video".
        place: The file, or archive and member.
        size: Width and height in pixels as the model's processor gets it; None: not readable.
        problem: Why it is not readable.
        frames: The frames of a video that the model reads.
    """

    kind: str
    place: str
    size: tuple[int, int] | None
    problem: str = ""
    frames: tuple[ShownMedia, ...] = ()


@dataclass(frozen=True)
class ShownInput:
    """A query or candidate: its prompt before tokenization, and its media in the order of their tokens."""

    prompt: str
    media: tuple[ShownMedia, ...]


@dataclass(frozen=True)
class ShownQuery:
    """A query.

    Attributes:
        row: Its number in the task, from 0.
        query: The input.
        candidates: Position and input of each candidate that is shown.
        num_candidates: Number of all its candidates.
        gold: Positions of the relevant candidates.
        gains: Their relevance; empty: all are equally relevant.
    """

    row: int
    query: ShownInput
    candidates: tuple[tuple[int, ShownInput], ...]
    num_candidates: int
    gold: tuple[int, ...]
    gains: tuple[float, ...]


@dataclass(frozen=True)
class ShownTask:
    """Some rows of a task as a family reads them."""

    benchmark: str
    task: str
    meta_task: str
    scope: str
    metric: str
    family: str
    num_queries: int
    queries: tuple[ShownQuery, ...]


def show_task(
    benchmark: Benchmark,
    task: EvalTask,
    folder: Path,
    prompts: PromptFormat,
    rows: slice,
    num_candidates: int | None = None,
) -> ShownTask:
    """Reads a task and writes some of its queries as a family reads them.

    Args:
        benchmark: The task's benchmark.
        task: One with a reader.
        folder: The data folder.
        prompts: How the family writes an input.
        rows: Queries to show, such as `slice(0, 3)`.
        num_candidates: Candidates of each query to show, relevant ones in any case; None: all.

    Raises:
        UserError: for a set that is missing or cannot be read, or if no query is among `rows`.
    """
    queries = read_task(task, folder, benchmark.quirks)
    chosen = range(len(queries))[rows]
    if not chosen:
        raise UserError(f"{task.name}: --rows selects no query; expected rows from 0 to {len(queries) - 1}")
    shown = _Shower(prompts)
    found = tuple(shown.query(row, queries[row], num_candidates) for row in chosen)
    facts = (benchmark.name, task.name, task.meta_task, task.scope, task.metric)
    return ShownTask(*facts, prompts.family, len(queries), found)


def as_json(task: ShownTask) -> dict[str, Any]:
    """The fields of `ShownTask`, for `--json`."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(task)))
    return content


def as_text(task: ShownTask) -> str:
    """Lines for the terminal. Prompts are JSON strings, so that spaces and line breaks are visible."""
    rows = ", ".join(str(query.row) for query in task.queries)
    lines = [
        f"{task.task} of {task.benchmark}: {task.meta_task}, {task.metric}, {task.scope} candidates; "
        f"prompts as {task.family} reads them; rows {rows} of {task.num_queries}"
    ]
    for query in task.queries:
        gains = f", gains {', '.join(f'{gain:g}' for gain in query.gains)}" if query.gains else ""
        gold = ", ".join(map(str, query.gold)) or "none"
        lines += ["", f"query {query.row}: {query.num_candidates} candidates, gold {gold}{gains}"]
        lines += _lines(query.query, "  ")
        for position, candidate in query.candidates:
            mark = "*" if position in query.gold else " "
            lines += _lines(candidate, f"  {mark}{position:>4} ")
        hidden = query.num_candidates - len(query.candidates)
        lines += [f"   and {hidden} more candidates"] if hidden else []
    return "\n".join(lines)


def as_html(task: ShownTask, thumbnails: Thumbnails | None = None) -> str:
    """A page with the images inside; it loads nothing else."""
    made = thumbnails or Thumbnails()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )

    def thumbnail(media: ShownMedia) -> Any:
        path, _, member = media.place.partition("::")
        return made.get(ImageRef(path=path, member=member or None), THUMBNAIL_PIXELS)

    environment.filters["escaped"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(task=task, thumbnail=thumbnail)


def _lines(item: ShownInput, lead: str) -> list[str]:
    lines = [lead + json.dumps(item.prompt, ensure_ascii=False)]
    for media in item.media:
        if media.kind == "video":
            about = f"video of {len(media.frames)} frames, {_size(media.frames[0])}" if media.frames else media.problem
        else:
            about = f"image, {_size(media)}"
        lines.append(" " * len(lead) + f"{about}: {media.place}")
    return lines


def _size(media: ShownMedia) -> str:
    return "{} x {}".format(*media.size) if media.size else f"not readable ({media.problem})"


class _Shower:
    """Writes inputs, each once: candidates repeat across queries."""

    def __init__(self, prompts: PromptFormat) -> None:
        self._prompts = prompts
        self._made: dict[int, ShownInput] = {}

    def query(self, row: int, query: EvalQuery, limit: int | None) -> ShownQuery:
        count = len(query.candidates)
        positions = sorted({*range(min(limit, count) if limit is not None else count), *query.relevant})
        candidates = tuple((position, self.input(query.candidates[position])) for position in positions)
        return ShownQuery(row, self.input(query.query), candidates, count, query.relevant, query.gains)

    def input(self, item: EmbeddingInput) -> ShownInput:
        if id(item) not in self._made:  # the queries hold every item, so that ids stay unique
            prompt, media = self._prompts.write(item)
            self._made[id(item)] = ShownInput(prompt, tuple(self._media(ref) for ref in media))
        return self._made[id(item)]

    def _media(self, ref: ImageRef | VideoRef) -> ShownMedia:
        if isinstance(ref, VideoRef):
            frames = tuple(self._media(frame) for frame in ref.sample(self._prompts.num_frames).images)
            place = _folder(frames) or str(ref.path or "")
            return ShownMedia("video", place, frames[0].size if frames else None, frames=frames)
        place = f"{ref.path}::{ref.member}" if ref.member else str(ref.path)
        try:
            return ShownMedia("image", place, ref.load().size)
        except UserError as error:
            return ShownMedia("image", place, None, str(error))


def _folder(frames: Sequence[ShownMedia]) -> str:
    """The folder of a video's frames, in the file system or an archive."""
    return frames[0].place.rpartition("/")[0] if frames else ""
