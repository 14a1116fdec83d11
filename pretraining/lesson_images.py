"""The images of the lessons that make `compact`, as features of the frozen vision encoder.

A photograph comes in four versions (whole, and three crops with other colors) and has six small parts, a drawing comes
in two versions (as it is, and somewhere on a colored ground), a composed image in one. All derive from fixed seeds.

Shapes: N images, T visual tokens, F features.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageEnhance
from torch import nn

from pretraining.captions import Drawing
from pretraining.photographs import LIST
from pretraining.scenes import CANVAS, Row, Scenes
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef

CROPS = (0.6, 0.45, 0.3)  # smallest share of a photograph's area
PARTS, PART_AREA = 6, (0.04, 0.4)  # number of small parts, and their share of a photograph's area
LARGEST = 640  # pixels; crops of a larger photograph show nothing more at 192
BATCH = 32


@dataclass
class Gallery:
    """Features of all images, and the row of each.

    Attributes:
        features_NTF: In float16.
        photographs: The rows of the versions of each photograph, the whole one first.
        parts: The rows of the small parts of each photograph.
        drawings: The rows of the versions of each drawing.
        scenes: The row of each composed image, with its questions and answers.
    """

    features_NTF: torch.Tensor
    photographs: dict[int, list[int]] = field(default_factory=dict)
    parts: dict[int, list[int]] = field(default_factory=dict)
    drawings: dict[int, list[int]] = field(default_factory=dict)
    scenes: dict[int, tuple[int, list[Row]]] = field(default_factory=dict)


def read_photographs(folder: Path) -> list[tuple[ImageRef, list[str]]]:
    """Images and texts that `pretraining.photographs` wrote."""
    rows = [json.loads(line) for line in (folder / LIST).read_text().splitlines()]
    return [(ImageRef(path=str(folder / row["image"])), row["texts"]) for row in rows]


def gallery(
    photographs: Sequence[ImageRef], drawings: Sequence[Drawing], num_scenes: int, vision: nn.Module
) -> Gallery:
    """Encodes all images. Images that cannot be read, such as a drawing of 200 megapixels, are left out.

    Args:
        photographs: Whole photographs.
        drawings: Named drawings; composed images are made of them.
        num_scenes: Number of composed images.
        vision: Images -> features [N, T, F].
    """
    scenes = Scenes(drawings)
    found, parts, waiting = Gallery(torch.empty(0)), list[torch.Tensor](), list[ImageRef]()
    numbers = itertools.count()

    def encode() -> None:
        with torch.inference_mode():
            parts.append(vision(waiting).half())
        waiting.clear()

    def rows_of(versions: Iterator[Image.Image]) -> list[int]:
        rows = []
        for version in versions:
            rows.append(next(numbers))
            waiting.append(ImageRef.of(version))
            if len(waiting) == BATCH:
                encode()
        return rows

    for number, rows in _readable(len(photographs), lambda i: rows_of(photograph_versions(photographs[i], i))):
        found.photographs[number] = rows
    for number, rows in _readable(len(drawings), lambda i: rows_of(drawing_versions(drawings[i], i, scenes))):
        found.drawings[number] = rows
    asked: dict[int, list[Row]] = {}
    for number, rows in _readable(num_scenes, lambda i: rows_of(_scene(scenes, i, asked))):
        found.scenes[number] = (rows[0], asked[number])
    for number in found.photographs:
        found.parts[number] = rows_of(photograph_parts(photographs[number], number))
    if waiting:
        encode()
    found.features_NTF = torch.cat(parts)
    return found


def photograph_versions(image: ImageRef, number: int) -> Iterator[Image.Image]:
    """The whole photograph, then crops, half of them mirrored, with other colors and brightness."""
    rng, whole = random.Random(f"p{number}"), image.load()
    whole.thumbnail((LARGEST, LARGEST))
    yield whole
    for least in CROPS:
        part = _crop(whole, rng, (least, 1.0), (0.85, 1.18))
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        part = ImageEnhance.Color(part).enhance(rng.uniform(0.4, 1.4))
        yield ImageEnhance.Brightness(part).enhance(rng.uniform(0.75, 1.25))


def photograph_parts(image: ImageRef, number: int) -> Iterator[Image.Image]:
    """Small parts of a photograph, some of which show an object."""
    rng, whole = random.Random(f"c{number}"), image.load()
    for _ in range(PARTS):
        part = _crop(whole, rng, PART_AREA, (0.7, 1.4))
        part.thumbnail((LARGEST, LARGEST))
        yield part


def drawing_versions(drawing: Drawing, number: int, scenes: Scenes) -> Iterator[Image.Image]:
    """The drawing as it is, then, but for skin tones, of any size and place on a white or light ground."""
    rng, whole = random.Random(f"d{number}"), drawing.image.load()
    whole.thumbnail((2 * CANVAS, 2 * CANVAS))
    yield whole
    if drawing.source != "tones":
        yield scenes.placed(rng, drawing)


def _scene(scenes: Scenes, number: int, asked: dict[int, list[Row]]) -> Iterator[Image.Image]:
    """A composed image; its questions and answers are put into `asked`."""
    rng = random.Random(f"s{number}")
    kinds = [scenes.grid] * 5 + [scenes.sheet] * 2 + [scenes.pair] * 2 + [scenes.count, scenes.colour, scenes.written]
    image, asked[number] = rng.choice(kinds)(rng)
    yield image


def _readable(count: int, rows_of: Callable[[int], list[int]]) -> Iterable[tuple[int, list[int]]]:
    """Yields number and rows of each image that can be read."""
    for number in range(count):
        try:
            yield number, rows_of(number)
        except UserError as error:
            print(f"left out: {error}")


def _crop(
    image: Image.Image, rng: random.Random, share: tuple[float, float], aspect: tuple[float, float]
) -> Image.Image:
    """A random part of an image whose share of the area and change of the aspect ratio are in these ranges."""
    side, stretch = rng.uniform(*share) ** 0.5, rng.uniform(*aspect)
    width, height = (
        max(1, min(image.width, int(image.width * side * stretch))),
        max(1, min(image.height, int(image.height * side / stretch))),
    )
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))
