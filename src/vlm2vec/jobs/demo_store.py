"""A small vector store for the demo of the search page. Its images are drawn here, so nothing is downloaded."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from vlm2vec.cache import cache_folder
from vlm2vec.files import replacing
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.sources import open_source
from vlm2vec.jobs.stores import facts_of, only_writer
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import VectorStore

if TYPE_CHECKING:
    from vlm2vec.models.embedder import Embedder

VERSION = 2  # raise it with every change of the drawn images or their table
SIDE, FINE = 224, 3  # width of an image in pixels; it is drawn FINE times larger and reduced
NUM_PAIRS, NUM_COUNTS = 60, 40
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (215, 35, 35), "green": (40, 160, 60), "blue": (45, 80, 215), "yellow": (245, 205, 30),
    "orange": (245, 130, 20), "purple": (130, 50, 160), "pink": (245, 130, 180), "brown": (120, 75, 40),
    "black": (20, 20, 20),
}  # fmt: skip
Spot = tuple[float, float, float]
"""Center (x, y) and radius, as fractions of the image's width."""


def demo_store(embedder: Embedder, model: str, progress: Callable[[int], None] = lambda done: None) -> VectorStore:
    """The store of the drawn images for a model, in the user's cache folder; created or completed if needed.

    Args:
        embedder: The model.
        model: Name or path from which it was loaded.
        progress: Called with the number of images done since the last call.
    """
    table = draw_images(cache_folder() / "ui" / f"images-{VERSION}")
    facts = facts_of(embedder, model)
    store = open_store(str(table.parent.with_name(f"demo-{VERSION}-{facts.fingerprint}.lance")), create=facts)
    with only_writer(store):
        index_source(embedder, open_source(table), store, progress=progress)
    return store


def num_images() -> int:
    """Number of images in the demo."""
    return len(SHAPES) * len(COLOURS) + NUM_PAIRS + NUM_COUNTS


def draw_images(folder: Path) -> Path:
    """Draws the images into a folder, which is complete or absent; returns the table that describes them."""
    table = folder / "images.jsonl"
    if table.is_file():
        return table
    rows = []
    with replacing(folder) as beside:
        beside.mkdir(parents=True)
        for image, about in _images(random.Random(0)):
            file = f"{about['name'].replace(' ', '-')}.png"
            image.save(beside / file)
            rows.append({"id": about["name"], "image": file, **about})
        (beside / table.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def _images(rng: random.Random) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Images of each shape in each color, then of two shapes, then of several equal shapes, with their names."""
    for shape in SHAPES:
        for colour in COLOURS:
            spot = (rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6), rng.uniform(0.24, 0.36))
            yield _image(rng, [(shape, colour, spot)]), _about(f"{colour} {shape}", shape, colour, 1)
    things = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    for (shape, colour), (other, tint) in zip(*(rng.sample(things, NUM_PAIRS) for _ in range(2)), strict=True):
        radius = rng.uniform(0.15, 0.2)
        spots = [(shape, colour, (0.27, rng.uniform(0.35, 0.65), radius))]
        spots.append((other, tint, (0.73, rng.uniform(0.35, 0.65), radius)))
        yield _image(rng, spots), _about(f"{colour} {shape} left of {tint} {other}", shape, colour, 2)
    for place, (shape, colour) in enumerate(rng.sample(things, NUM_COUNTS)):
        count = 2 + place % 8
        cells = rng.sample(range(9), count)
        spots = [(shape, colour, (0.2 + 0.3 * (cell % 3), 0.2 + 0.3 * (cell // 3), 0.12)) for cell in cells]
        yield _image(rng, spots), _about(f"{NUMBERS[count - 1]} {colour} {_several(shape)}", shape, colour, count)


def _several(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _about(name: str, shape: str, colour: str, count: int) -> dict[str, Any]:
    return {"name": name, "shape": shape, "colour": colour, "count": count}


def _image(rng: random.Random, things: Sequence[tuple[str, str, Spot]]) -> Image.Image:
    ground = tuple(rng.randint(222, 255) for _ in range(3))
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), ground)
    for shape, colour, (x, y, radius) in things:
        scale = SIDE * FINE
        points = [(scale * (x + radius * dx), scale * (y + radius * dy)) for dx, dy in SHAPES[shape]]
        ImageDraw.Draw(canvas).polygon(points, fill=COLOURS[colour])
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _round(corners: int, radii: Sequence[float] = (1.0,), turn: float = -0.25) -> list[tuple[float, float]]:
    """A closed outline whose corners take the radii in turn; `turn` is a fraction of a full turn."""
    angles = [2 * math.pi * (i / corners + turn) for i in range(corners)]
    return [
        (radii[i % len(radii)] * math.cos(angle), radii[i % len(radii)] * math.sin(angle))
        for i, angle in enumerate(angles)
    ]


def _heart() -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / 90 for i in range(90)]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in steps]
    return [(math.sin(t) ** 3, -y / 16) for t, y in zip(steps, ys, strict=True)]


def _moon() -> list[tuple[float, float]]:
    outer = [2 * math.pi * (0.1 + 0.8 * i / 60) for i in range(61)]
    tip = (math.cos(outer[0]), math.sin(outer[0]))
    inner_radius = math.hypot(tip[0] - 0.5, tip[1])
    half = math.atan2(tip[1], tip[0] - 0.5)
    inner = [2 * math.pi - half - (2 * math.pi - 2 * half) * i / 60 for i in range(61)]
    return [
        *((math.cos(a), math.sin(a)) for a in outer),
        *((0.5 + inner_radius * math.cos(a), inner_radius * math.sin(a)) for a in inner),
    ]


CROSS = [(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1), (-0.33, 1),
         (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)]  # fmt: skip
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _round(90),
    "square": _round(4, turn=0.125),
    "triangle": _round(3),
    "star": _round(10, (1.0, 0.42)),
    "heart": _heart(),
    "moon": _moon(),
    "hexagon": _round(6),
    "cross": CROSS,
}
"""Outlines around (0, 0) of radius 1."""
