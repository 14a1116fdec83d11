"""Composes scenes for the pretraining of `compact`: named drawings at known positions, and questions about them.

A scene is a square image of 192 pixels with two to nine questions and answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

from pretraining.captions import NAME_PROMPTS, Drawing
from vlm2vec.media.images import ImageRef

CANVAS = 192
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (215, 35, 35), "green": (40, 160, 60), "blue": (45, 80, 215), "yellow": (245, 220, 40),
    "orange": (245, 140, 30), "purple": (130, 50, 160), "pink": (245, 150, 190), "brown": (120, 75, 40),
    "black": (15, 15, 15), "grey": (130, 130, 130), "white": (255, 255, 255),
}  # fmt: skip
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PLACES = ("top left", "top middle", "top right", "middle left", "center", "middle right",
          "bottom left", "bottom middle", "bottom right")  # fmt: skip
PLACE_PROMPTS = ("What is in the {}?", "What is at the {}?", "Name the thing in the {}.", "the one in the {}")
BESIDE = {(-1, 0): "left of", (1, 0): "right of", (0, -1): "above", (0, 1): "below"}
BESIDE_PROMPTS = ("What is {} the {}?", "Name what is {} the {}.")
Row = tuple[str, str]


class Scenes:
    """Composes scenes from named drawings.

    Args:
        drawings: The drawings to use; those with names of more than four words are skipped.
    """

    def __init__(self, drawings: Sequence[Drawing]) -> None:
        short = [drawing for drawing in drawings if len(drawing.name.split()) <= 4 and drawing.source != "tones"]
        self.emoji = [drawing for drawing in short if drawing.source == "emoji"]
        self.others = [drawing for drawing in short if drawing.source != "emoji"]
        self._sprites: dict[ImageRef, Image.Image] = {}

    def grid(self, rng: random.Random) -> tuple[Image.Image, list[Row]]:
        """Draws four drawings, one in each quadrant, with random size and position."""
        four, canvas, half = self._draw(rng, 4), _canvas(rng), CANVAS // 2
        for place, drawing in enumerate(four):
            side = rng.randint(58, 92)
            left, top = (rng.randint(0, half - side) + half * axis for axis in (place % 2, place // 2))
            self._paste(canvas, drawing, left, top, side)
        names = [drawing.name for drawing in four]
        rows = [(_say(rng, CORNERS[i] + rng.choice(("", " corner"))), names[i]) for i in range(4)]
        return canvas, [*rows, *self._beside(rng, names, 2, 3), *_everything(rng, names), _where(rng, names, CORNERS)]

    def sheet(self, rng: random.Random) -> tuple[Image.Image, list[Row]]:
        """Draws nine drawings in a 3x3 grid."""
        nine, canvas, cell = self._draw(rng, 9), _canvas(rng), CANVAS // 3
        for place, drawing in enumerate(nine):
            side = rng.randint(52, cell)
            self._paste(canvas, drawing, cell * (place % 3), cell * (place // 3), side)
        names = [drawing.name for drawing in nine]
        rows = [(_say(rng, PLACES[i]), names[i]) for i in rng.sample(range(9), 4)]
        picked = rng.choice(names)
        shown = (rng.choice(("the {}", "Point at the {}.", "the one called {}")).format(picked), picked)
        return canvas, [*rows, *self._beside(rng, names, 3, 2), shown, _where(rng, names, PLACES)]

    def pair(self, rng: random.Random) -> tuple[Image.Image, list[Row]]:
        """Draws two drawings side by side or one above the other."""
        two, canvas, upright = self._draw(rng, 2), _canvas(rng), rng.random() < 0.5
        for place, drawing in enumerate(two):
            side, shift = rng.randint(70, 96), rng.randint(0, 90)
            along = place * CANVAS // 2
            self._paste(canvas, drawing, *((shift, along) if upright else (along, shift)), side)
        names = [drawing.name for drawing in two]
        ends = ("top", "bottom") if upright else ("left", "right")
        rows = [(_say(rng, ends[i]), names[i]) for i in range(2)]
        return canvas, [*rows, *self._beside(rng, names, 1 if upright else 2, 2), *_everything(rng, names)]

    def count(self, rng: random.Random) -> tuple[Image.Image, list[Row]]:
        """Draws one drawing one to nine times, for counting."""
        (drawing,), canvas, number = self._draw(rng, 1), _canvas(rng), rng.randint(1, 9)
        for place in rng.sample(range(9), number):
            self._paste(canvas, drawing, 64 * (place % 3), 64 * (place // 3), rng.randint(50, 64))
        asked = rng.choice(("How many are there?", "Count them.", f"How many {drawing.name} are there?"))
        told = f"{NUMBERS[number - 1]} {drawing.name}"
        return canvas, [
            (asked, NUMBERS[number - 1]),
            (rng.choice(NAME_PROMPTS), told),
            ("What are they?", drawing.name),
        ]

    def colour(self, rng: random.Random) -> tuple[Image.Image, list[Row]]:
        """Draws the silhouette of a drawing in one colour on a background of another colour."""
        (drawing,) = self._draw(rng, 1)
        inside, around = rng.sample(list(COLOURS), 2)
        canvas, side = Image.new("RGB", (CANVAS, CANVAS), COLOURS[around]), rng.randint(100, 180)
        sprite = self._sprite(drawing).convert("L").resize((side, side))
        outline = sprite.point(lambda value: 255 if value < 235 else 0)
        place = (rng.randint(0, CANVAS - side), rng.randint(0, CANVAS - side))
        canvas.paste(COLOURS[inside], (*place, place[0] + side, place[1] + side), outline)
        rows = [("What colour is it?", inside), ("What colour is the background?", around)]
        return canvas, [*rows, (rng.choice(NAME_PROMPTS), f"{inside} {drawing.name}"), ("What is it?", drawing.name)]

    def placed(self, rng: random.Random, drawing: Drawing) -> Image.Image:
        """Draws a given drawing at a random position, mirrored half of the time, on a white or light ground."""
        ground = (255, 255, 255) if rng.random() < 0.4 else tuple(rng.randint(170, 255) for _ in range(3))
        canvas, side = Image.new("RGB", (CANVAS, CANVAS), ground), rng.randint(90, CANVAS)
        left, top = rng.randint(0, CANVAS - side), rng.randint(0, CANVAS - side)
        self._paste(canvas, drawing, left, top, side, mirrored=rng.random() < 0.5)
        return canvas

    def written(self, rng: random.Random) -> tuple[Image.Image, list[Row]]:
        """Renders the first three words of a name as text."""
        (drawing,) = self._draw(rng, 1)
        ground, ink = rng.choice((("white", "black"), ("black", "white"), ("white", "navy"), ("beige", "maroon")))
        canvas = Image.new("RGB", (CANVAS, CANVAS), ground)
        font = ImageFont.load_default(size=rng.randint(28, 44))
        words = "\n".join(drawing.name.split()[:3])
        ImageDraw.Draw(canvas).multiline_text((rng.randint(2, 14), rng.randint(4, 60)), words, fill=ink, font=font)
        prompts = rng.sample(("What does it say?", "Read it.", "What is written here?"), 2)
        return canvas, [(prompt, " ".join(words.split())) for prompt in prompts]

    def _draw(self, rng: random.Random, number: int) -> list[Drawing]:
        """Samples `number` drawings with different names: all emoji with probability 0.6, otherwise no emoji."""
        pool = self.emoji if rng.random() < 0.6 else self.others
        chosen: dict[str, Drawing] = {}
        while len(chosen) < number:
            drawing = rng.choice(pool)
            chosen.setdefault(drawing.name, drawing)
        return list(chosen.values())

    def _sprite(self, drawing: Drawing) -> Image.Image:
        if drawing.image not in self._sprites:
            image = drawing.image.load()
            image.thumbnail((CANVAS, CANVAS))
            box = ImageChops.invert(image).getbbox() or (0, 0, *image.size)
            image = image.crop(box)
            square = Image.new("RGB", (max(image.size), max(image.size)), "white")
            square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
            self._sprites[drawing.image] = square
        return self._sprites[drawing.image]

    def _paste(
        self, canvas: Image.Image, drawing: Drawing, left: int, top: int, side: int, mirrored: bool = False
    ) -> None:
        sprite = self._sprite(drawing).resize((side, side), Image.Resampling.BICUBIC)
        if mirrored:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        under = canvas.crop((left, top, left + side, top + side))
        canvas.paste(ImageChops.multiply(under, sprite), (left, top))  # white becomes transparent

    def _beside(self, rng: random.Random, names: Sequence[str], columns: int, number: int) -> list[Row]:
        """Builds questions about which drawing is next to another one."""
        rows = []
        for _ in range(number):
            near = rng.randrange(len(names))
            x, y = near % columns, near // columns
            steps = [(dx, dy) for dx, dy in BESIDE if 0 <= x + dx < columns and 0 <= y + dy < len(names) // columns]
            dx, dy = rng.choice(steps)
            asked = rng.choice(BESIDE_PROMPTS).format(BESIDE[dx, dy], names[near])
            rows.append((asked, names[near + dx + dy * columns]))
        return rows


def _canvas(rng: random.Random) -> Image.Image:
    ground = (255, 255, 255) if rng.random() < 0.6 else tuple(rng.randint(190, 255) for _ in range(3))
    return Image.new("RGB", (CANVAS, CANVAS), ground)


def _say(rng: random.Random, place: str) -> str:
    return rng.choice(PLACE_PROMPTS).format(place)


def _everything(rng: random.Random, names: Sequence[str]) -> list[Row]:
    return [(rng.choice(("What is shown?", "Describe the picture.", "List what you see.")), ", ".join(names))]


def _where(rng: random.Random, names: Sequence[str], places: Sequence[str]) -> Row:
    index = rng.randrange(len(names))
    return f"Where is the {names[index]}?", places[index]
