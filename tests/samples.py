"""Small images and training sets shared by several test modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}


def draw(path: Path, color: str, seed: int) -> None:
    """A noisy image of one colour."""
    noise = np.random.default_rng(seed).integers(-25, 25, size=(40, 40, 3))
    pixels = np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_train_set(root: Path, name: str, rows: list[dict[str, str]]) -> Path:
    """One set in the MMEB-train layout; absent fields are ""."""
    table = pa.Table.from_pylist([{**dict.fromkeys(TRAIN_COLUMNS, ""), **row} for row in rows])
    file = root / name / "original-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return file
