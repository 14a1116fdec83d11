"""A benchmark of plain colours in the MMEB layout, and encoders that are perfect, random or constant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from vlm2vec.types import EmbeddingInput

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 160, 40),
    "blue": (20, 40, 220),
    "yellow": (240, 230, 30),
    "purple": (130, 20, 160),
    "orange": (250, 140, 10),
    "pink": (250, 150, 200),
    "black": (10, 10, 10),
    "brown": (110, 60, 20),
    "grey": (128, 128, 128),
}
IMAGE_TEXT = "<|image_1|>\nRepresent the given image."
NUM_FIND = 60


def write_toy_benchmark(folder: Path, **changes: Any) -> Path:
    """Two tasks: `Find` (text to image) and `Name` (image to text). `changes` go into the first task's row.

    The queries of `Name` are the candidates of `Find`, so that tasks share inputs.
    """
    images = folder / "eval" / "Pictures"
    images.mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (200, 150), colour).save(images / f"{name}.png")
    names = list(COLOURS)
    find = [(f"Number {i}: find {names[i % 10]}", "", names[i % 10]) for i in range(NUM_FIND)]
    _write_set(
        folder / "eval" / "Find",
        [(text, image, [IMAGE_TEXT] * 10, [_path(n) for n in _first(gold, names)]) for text, image, gold in find],
    )
    _write_set(
        folder / "eval" / "Name",
        [(IMAGE_TEXT, _path(gold), _first(gold, names), [""] * 10) for gold in names],
    )
    facts = {"split": "ind", "metric": "hit@1", "num_candidates": 10}
    tasks = [
        {"name": "Find", "meta_task": "retrieval", **facts, "num_queries": NUM_FIND, **changes},
        {"name": "Name", "meta_task": "classification", **facts, "split": "ood", "num_queries": 10},
    ]
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump({"name": "colours", "tasks": tasks, "source": {"eval": "eval"}}))
    return path


def _first(gold: str, names: Sequence[str]) -> list[str]:
    return [gold, *(name for name in names if name != gold)]


def _path(name: str) -> str:
    return f"Pictures/{name}.png"


def _write_set(folder: Path, rows: list[tuple[str, str, list[str], list[str]]]) -> None:
    folder.mkdir(parents=True)
    columns = zip(*rows, strict=True)
    names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    table = pa.table({name: list(column) for name, column in zip(names, columns, strict=True)})
    pq.write_table(table, folder / "test-00000-of-00001.parquet")


class ColourEncoder:
    """Knows colours: one direction each, from the words of a text or the first pixel of an image."""

    def __init__(self) -> None:
        self.seen: list[EmbeddingInput] = []

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        self.seen += inputs
        return np.eye(len(COLOURS), dtype=np.float32)[[self._colour(item) for item in inputs]]

    def _colour(self, item: EmbeddingInput) -> int:
        if item.images:
            return list(COLOURS.values()).index(item.images[0].load().getpixel((0, 0)))
        return next(i for i, name in enumerate(COLOURS) if name in (item.text or "").split())


class RandomEncoder:
    """Guesses: an unrelated direction for every input."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        vectors = self.random.normal(size=(len(inputs), 64)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class ConstantEncoder:
    """Collapsed: one vector for everything."""

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        return np.full((len(inputs), 4), 0.5, dtype=np.float32)
