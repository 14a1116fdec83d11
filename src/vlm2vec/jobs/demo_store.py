"""A small store to try searching on: images that are drawn here, so nothing is fetched and no file is shipped."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from vlm2vec.cache import cache_folder
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.sources import open_source
from vlm2vec.jobs.stores import facts_of, only_writer
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import VectorStore

if TYPE_CHECKING:
    from vlm2vec.models.embedder import Embedder

VERSION = 1  # to be raised with every change of the drawn images
SIDE, FINE = 224, 3  # pixels of an image; drawn so many times larger, then reduced
NUM_PAIRS, NUM_COUNTS = 60, 40
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (215, 35, 35), "green": (40, 160, 60), "blue": (45, 80, 215), "yellow": (245, 205, 30),
    "orange": (245, 130, 20), "purple": (130, 50, 160), "pink": (245, 130, 180), "brown": (120, 75, 40),
    "black": (20, 20, 20),
}  # fmt: skip
Spot = tuple[float, float, float]
"""Middle and radius, in shares of the image's side."""


def demo_store(embedder: Embedder, model: str, progress: Callable[[int], None] = lambda done: None) -> VectorStore:
    """The store of the drawn images by this model, in the user's cache; made or completed where it is not there.

    Args:
        embedder: As loaded.
        model: What loaded it.
        progress: Called with the number of images done since the last call.
    """
    table = draw_images(cache_folder() / "ui" / f"pictures-{VERSION}")
    facts = facts_of(embedder, model)
    store = open_store(str(table.parent.with_name(f"demo-{VERSION}-{facts.fingerprint}.lance")), create=facts)
    with only_writer(store):
        index_source(embedder, open_source(table), store, progress=progress)
    return store


def num_images() -> int:
    """How many images the demo has."""
    return len(SHAPES) * len(COLOURS) + NUM_PAIRS + NUM_COUNTS


def draw_images(folder: Path) -> Path:
    """Draws the images into a folder, whole or not at all; returns the table that names them."""
    table = folder / "pictures.jsonl"
    if table.is_file():
        return table
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    rows = []
    for image, about in _images(random.Random(0)):
        file = f"{about['name'].replace(' ', '-')}.png"
        image.save(beside / file)
        rows.append({"id": about["name"], "image": file, **about})
    (beside / table.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(folder)
    return table


def _images(rng: random.Random) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Each shape in each colour alone, then pairs, then several of one, all by name."""
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
    """A closed line around the middle, the radii in turn; `turn` in shares of a whole one."""
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
