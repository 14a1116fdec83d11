"""Small made-up training sets in the published layouts, for dry runs."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2vec.data.mmeb.images import write_train_set
from vlm2vec.data.mmeb.training_sets import FRAMES_FOLDER, NUM_FRAMES, SETS, SFT, PageSet, VideoSet


def make_set(root: Path, name: str, pairs: int) -> None:
    """Writes a set of pairs, each with a different image and text, below a data folder.

    Args:
        root: Data folder; created if needed.
        name: Name of the set: one of `SETS` gets its own layout, any other name the MMEB-train layout.
        pairs: Number of pairs.
    """
    layout = SETS.get(name)
    if isinstance(layout, PageSet):
        _write_pages(root / name, layout, pairs)
    elif isinstance(layout, VideoSet):
        _write_videos(root, layout, pairs)
    else:
        _write_rows(root, name, pairs)


def _image(number: int) -> Image.Image:
    return Image.new("RGB", (40 + 9 * number, 40), (30 * number % 256, 255 - 30 * number % 256, 90))


def _answer(number: int) -> str:
    return f"image {'very ' * number}{number}"


def _write_rows(root: Path, name: str, pairs: int) -> None:
    rows = []
    for i in range(pairs):
        path = f"images/{name}/{i}.png"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        _image(i).save(root / path)
        rows.append({"qry": f"<|image_1|>\nWhat is it? {i}\n", "qry_image_path": path, "pos_text": _answer(i)})
    write_train_set(root, name, rows)


def _write_pages(folder: Path, layout: PageSet, pairs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(pairs):
        page = BytesIO()
        _image(i).save(page, "PNG")
        rows.append(
            {**dict.fromkeys(layout.columns, _answer(i)), "image": {"bytes": page.getvalue(), "path": f"{i}.png"}}
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "made.parquet")


def _write_videos(root: Path, layout: VideoSet, pairs: int) -> None:
    (root / SFT).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(pairs):
        frames = root / FRAMES_FOLDER / f"v{i}"
        frames.mkdir(parents=True, exist_ok=True)
        for frame in range(NUM_FRAMES):
            _image(i + frame).resize((40, 40)).save(frames / f"{frame}.png")
        turns = [{"from": "human", "value": f"<video>\nWhat is it? {i}"}, {"from": "gpt", "value": _answer(i)}]
        lines.append(json.dumps({"id": i, "video": f"v{i}", "conversations": turns}) + "\n")
    (root / SFT / layout.file).write_text("".join(lines), encoding="utf-8")
