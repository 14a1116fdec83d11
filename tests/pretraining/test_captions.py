"""Drawings and questions for the pretraining of `compact`: held-out names are left out, and answers match images."""

import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from pretraining import captions
from pretraining.captions import Drawing, HeldOut, clean, definitions
from pretraining.scenes import BESIDE, CORNERS, NUMBERS, PLACES, Scenes
from vlm2vec import UserError
from vlm2vec.media.images import ImageRef

COLOURS = {"cat": (200, 0, 0), "dog": (0, 160, 0), "cow": (0, 0, 200), "hen": (160, 0, 160), "pig": (90, 90, 0),
           "bee": (0, 120, 120), "ant": (60, 60, 60), "owl": (200, 100, 0), "fox": (100, 0, 60)}  # fmt: skip


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    drawings = [
        Drawing("emoji", ImageRef.of(Image.new("RGB", (64, 64), colour)), name) for name, colour in COLOURS.items()
    ]
    scenes = Scenes(drawings)
    scenes.others = scenes.emoji
    return scenes


def shown(image: Image.Image, left: int, top: int, side: int) -> str:
    """The name whose colour a part of the image is nearest to."""
    part = image.crop((left, top, left + side, top + side))
    red, green, blue = part.split()
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
    box = darkest.point(lambda value: 255 if value < 185 else 0).getbbox()  # the ground is lighter than that
    if box is None:
        return ""
    pixel = part.getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))


@pytest.mark.parametrize(("kind", "columns", "places"), [("grid", 2, CORNERS), ("sheet", 3, PLACES)])
def test_the_answer_is_what_the_question_points_at(
    scenes: Scenes, kind: str, columns: int, places: tuple[str, ...]
) -> None:
    side = 192 // columns
    for seed in range(20):
        image, rows = getattr(scenes, kind)(random.Random(seed))
        names = [shown(image, side * (i % columns), side * (i // columns), side) for i in range(columns**2)]
        for prompt, answer in rows:
            place = next((place for place in sorted(places, key=len, reverse=True) if place in prompt), None)
            beside = next((step for step, words in BESIDE.items() if f"{words} the" in prompt), None)
            if beside:
                near = next(i for i, name in enumerate(names) if name in prompt.split("the ")[-1])
                assert names[near + beside[0] + columns * beside[1]] == answer, prompt
            elif place:
                assert names[places.index(place)] == answer, prompt
            elif prompt.startswith("Where"):
                assert names[places.index(answer)] in prompt


def test_counts_are_what_is_drawn(scenes: Scenes) -> None:
    for seed in range(20):
        image, rows = scenes.count(random.Random(seed))
        number = sum(shown(image, 64 * (i % 3), 64 * (i // 3), 64) != "" for i in range(9))
        assert NUMBERS[number - 1] == rows[0][1]


def test_no_drawing_has_a_held_out_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "held_out_names", lambda root: ["bear", "bus stop"])
    held, image = HeldOut(Path()), ImageRef(path="x.png")
    assert [words in held for words in ("a Bear", "bears", "bearing", "bus", "the bus stop", "beard")] == [
        True, True, False, False, True, False]  # fmt: skip
    drawings = [Drawing("a", image, "polar bear", ("cow",)), Drawing("a", image, "cow", ("bear", "milk"))]
    assert held.known(drawings) == [Drawing("a", image, "cow", ("milk",))]


def test_names_are_plain_words() -> None:
    given = ("Red_Car-02", "x" * 60, "Straße", "cow v. 3", "A. Cow (old)", "12")
    assert [clean(words) for words in given] == ["red car", "", "", "cow", "a. cow (old)", ""]


def test_definitions_are_read_from_wordnet_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unpack the Debian package wordnet-base"):
        list(definitions(tmp_path))
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    line = '00001740 03 n 02 ice_cream 0 icecream 0 000 | frozen and sweet; "ice cream for everyone"  \n'
    for part in ("noun", "verb", "adj"):
        (folder / f"data.{part}").write_text("  1 a licence\n" + line)
    assert next(iter(definitions(tmp_path))) == ("ice cream", "frozen and sweet", ["ice cream for everyone"])
