"""Writes the rows of `tests/golden/mmeb` to disk and describes our inputs and scores in the recorded format."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.evaluation.benchmark import read_benchmark
from vlm2vec.evaluation.score import TaskResult, score_task
from vlm2vec.evaluation.tasks import read_task
from vlm2vec.media.images import ImageRef
from vlm2vec.models.prompts import PromptTemplate
from vlm2vec.types import EmbeddingInput, EvalQuery, content_key

FOLDER = Path(__file__).parent.parent / "golden/mmeb"
TASKS = {task.name: task for task in read_benchmark("mmeb-v2")[0].tasks}
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
Colours = tuple[tuple[int, ...], ...]
Seen = tuple[str, Colours]
"""A prompt with the backbone's tokens, and the colours of its media in order."""


def golden_names() -> list[str]:
    """Tasks and variants."""
    return sorted(file.stem for file in FOLDER.glob("[!_]*.json"))


def read_golden(name: str) -> dict[str, Any]:
    """A recorded task."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def encoded(spec: Sequence[int]) -> bytes:
    """A PNG of one colour: `[width, height, r, g, b]`."""
    width, height, *rgb = spec
    output = io.BytesIO()
    Image.new("RGB", (width, height), tuple(rgb)).save(output, format="PNG")
    return output.getvalue()


def write_golden(golden: dict[str, Any], root: Path) -> None:
    """A recorded task's rows, images and labels below a data folder."""
    files = golden["files"]
    for path, spec in files["pictures"].items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(spec))
    for path, text in files["other"].items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    places = files["rows"] if isinstance(files["rows"], dict) else {None: files["rows"]}
    for part, place in places.items():
        rows = golden["rows"] if part is None else [_with_image(row) for row in golden["rows"][part]]
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / place)
    if "labels" in files:
        (root / files["labels"]).write_text("\n".join(golden["labels"]) + "\n")


PUBLISHED = Quirks()


def read_queries(golden: dict[str, Any], root: Path, quirks: Quirks = PUBLISHED) -> list[EvalQuery]:
    """Our queries of a recorded task."""
    return read_task(TASKS[golden["task"]], root, quirks)


def seen(item: EmbeddingInput) -> Seen:
    """What a model of the Qwen line reads of an input."""
    if item.video is not None:
        text = (item.text or "").replace("<|video_1|>", VIDEO)
        return text, tuple(colour_of(frame) for frame in item.video.sample(8).images)
    prompt = PromptTemplate().render(item)
    order = [int(number) - 1 for number in re.findall(r"<\|image_(\d+)\|>", prompt)]
    text = re.sub(r"<\|image_\d+\|>", IMAGE, prompt)
    return text, tuple(colour_of(item.images[position]) for position in order)


def colour_of(image: ImageRef) -> tuple[int, ...]:
    """Mean colour, on the grid that the recorded images use: the same after a lossy copy."""
    mean = np.asarray(image.load(), dtype=float).reshape(-1, 3).mean(axis=0)
    return tuple(round((value - 8) / 16) for value in mean)


def colours_of_spec(spec: Sequence[int]) -> tuple[int, ...]:
    """The same of a recorded image."""
    return tuple((value - 8) // 16 for value in spec[2:])


def expected_seen(golden: dict[str, Any], text: str, media: Sequence[str], name: str = "") -> Seen:
    """A recorded query or candidate."""
    if media and isinstance(golden["rows"], dict):  # the pages lie in the corpus
        pages = {str(row["corpus-id"]): row["image"]["picture"] for row in golden["rows"]["corpus"]}
        return text, (colours_of_spec(pages[name]),)
    return text, tuple(colours_of_spec(golden["files"]["pictures"][path]) for path in media)


def expected_candidates(golden: dict[str, Any], entry: dict[str, Any]) -> list[Seen]:
    """Candidates of one recorded query."""
    listed = golden["corpus"] if entry["scope"] == "global" else entry["candidates"]
    return [expected_seen(golden, one["text"], one["media"], one.get("name", "")) for one in listed]


def scored(golden: dict[str, Any], queries: Sequence[EvalQuery], merged: bool = False) -> TaskResult:
    """Our scores of vectors that depend on what a model would read."""
    items: dict[bytes, EmbeddingInput] = {}

    def key_of(item: EmbeddingInput) -> bytes:
        key = content_key(item, lambda media: bytes.fromhex(media.digest()))
        items[key] = item
        return key

    def rows_of(keys: Sequence[bytes]) -> np.ndarray:
        return np.stack([_vector(*seen(items[key])) for key in keys])

    return score_task(TASKS[golden["task"]], queries, rows_of, key_of, merged=merged)


def _vector(text: str, colours: Colours) -> np.ndarray:
    bare = re.sub(r"<\|(image|video)_pad\|>", "", text).strip(" ")
    content = json.dumps([bare, [list(colour) for colour in colours]])
    seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(48)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _with_image(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("image"), dict):
        return row
    return {**row, "image": {"bytes": encoded(row["image"]["picture"]), "path": row["image"]["path"]}}
