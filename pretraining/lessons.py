"""The lessons that make `compact`: an input, and the text whose sentence vector it should have.

A lesson is a caption with an instruction and the caption itself, a photograph and what its book says of it, a drawing
and its name, a composed image with a question and the answer, or a drawing with a change and the name of the result.
Some answers are images: the part of a photograph that shows an object, another version of a photograph, a drawing with
another skin tone.
The instructions are MMEB's; no image of a benchmark is among them.
"""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pretraining.captions import NAME_PROMPTS, Drawing, HeldOut
from pretraining.lesson_images import Gallery
from vlm2vec.models.backbones.compact.model import names_of_places
from vlm2vec.models.backbones.compact.seen_classes import names_of_classes

SHARES = {
    "photograph": 0.19,
    "described": 0.05,
    "name": 0.10,
    "object": 0.05,
    "text": 0.20,
    "question": 0.20,
    "edit": 0.06,
    "region": 0.06,
    "part": 0.06,
    "view": 0.03,
}
"""How often each kind of lesson is drawn."""
LONGEST = 110  # characters of a caption
NUM_GENERAL = 24000
KINDS = ("object", "main object", "item", "product", "clothing item", "animal", "scene", "category", "food", "vehicle",
         "emoji", "drawing")  # fmt: skip
IDENTIFY = ("Identify the {} shown in the image", "Identify the {} of the given image", "Classify the {} in the image")
CAPTION = "<|image_1|>\nFind an image caption describing the given {}.\n"
FIND = (
    "Find me an {} that matches the given caption: {}\n",
    "Find me an {} that matches the given description: {}\n",
    "Find an {} of: {}\n",
    "Retrieve an {} of this description: {}\n",
)
IMAGES = ("image", "everyday image", "image", "emoji", "drawing")
ASK = "<|image_1|>\nRepresent the given image with the following question: {}\n"
SELECT = '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "{}"\n'
FOLLOW = '<|image_1|>\nSelect the portion of the image that follows the language expressions. "{}"\n'
EDIT = "<|image_1|>\nFind the same {} with the described change: with {}\n"
DESCRIBED = "<|image_1|>\nRepresent the given {} with its description: {}\n"
ENTRY = (
    "<|image_1|>\nRetrieve an image-description pair about what this image shows.\n",
    "<|image_1|>\nRetrieve the entry of a catalogue about the object in the image.\n",
    "<|image_1|>\nFind the article about the subject of the given image.\n",
)
SIMILAR = "<|image_1|>\nFind an image that looks similar to the provided image.\n"
IMAGE = "<|image_1|>\nRepresent the given image.\n"
CROP = "<|image_1|>\nRepresent the given cropped image of the object.\n"
CROPPED = (CROP, CROP.replace(".\n", "\n"))
ALONE = (IMAGE, IMAGE, IMAGE.rstrip("\n"), *CROPPED, "<|image_1|>\n", "<|image_1|>")
LABELLED = re.compile(r"^(?:the|Point at the|the one called) (?!one in)([^.]+?)\.?$")
PLACED = re.compile(r"^the one in the (.+)$")
NOT_A_PLACE = re.compile(r"of the|above|below|Where|How|colou?r|say|Read|written|Count|they|shown|see|List|Describe")
PLACES = {*names_of_places(3), "top", "bottom", "left", "right"}


@dataclass(frozen=True, slots=True)
class Lesson:
    """An input and its right answers.

    Attributes:
        kind: A key of `SHARES`.
        prompt: MMEB's prompt, with an image token if there is an image.
        image: Row of the gallery's features; None for a text.
        bank: The set of texts among which the answer is searched; "" if only an image is the answer.
        target: The answer.
        right: All texts that are no wrong answers.
        beside: The other names in a composed image.
        group: Number of the photograph, or a negative number. Images of one group are no wrong answers for each other.
        shown: Prompt and row of the image that is the answer; None if the answer is a text alone.
        wrong: An image that is a wrong answer though it looks like the right one.
    """

    kind: str
    prompt: str
    image: int | None
    bank: str
    target: str
    right: tuple[str, ...]
    beside: tuple[str, ...] = ()
    group: int = -1
    shown: tuple[str, int] | None = None
    wrong: tuple[str, int] | None = None


@dataclass(frozen=True)
class Unseen:
    """What no lesson shows, for the scores of `pretraining.teach_sentence`.

    Attributes:
        photographs: Numbers of photographs.
        names: Names of drawings.
        scenes: Numbers of composed images.
        demo: The names in the test of the demo benchmark.
    """

    photographs: frozenset[int]
    names: frozenset[str]
    scenes: frozenset[int]
    demo: HeldOut


@dataclass
class Lessons:
    """Draws lessons of the kinds in `SHARES`.

    Args:
        gallery: Features of all images.
        said: The texts of each photograph.
        drawings: The named drawings of the gallery.
        objects: Number and ImageNet class of the photographs that the vision encoder's classifier is sure of.
        parts: Number of the photograph, row and class of the small parts that it is sure of.
        general: Sentences of any kind, so that other texts keep their vectors.
        unseen: What no lesson shows. Its texts are among the wrong answers.
        seed: Of all choices.
    """

    gallery: Gallery
    said: Mapping[int, Sequence[str]]
    drawings: Sequence[Drawing]
    objects: Sequence[tuple[int, int]]
    parts: Sequence[tuple[int, int, int]]
    general: Sequence[str]
    unseen: Unseen
    seed: int = 0
    banks: dict[str, list[str]] = field(init=False)
    asked_unseen: list[Lesson] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        named = [number for number in self.gallery.drawings if self.drawings[number].source != "tones"]
        self.plain = {self.drawings[n].name: n for n in named if self.drawings[n].source == "emoji"}
        self.named = [number for number in named if self.drawings[number].name not in self.unseen.names]
        self.tones = [number for number in self.gallery.drawings if self._base(number) in self.plain]
        self.shown = [number for number in self.said if number not in self.unseen.photographs]
        self.classes = [tuple(name.split(", ")) for name in names_of_classes()]
        asked = {number: list(self._asked(*scene)) for number, scene in self.gallery.scenes.items()}
        answers = {lesson.target for lessons in asked.values() for lesson in lessons}
        self.asked_unseen = [lesson for number in self.unseen.scenes for lesson in asked.pop(number, ())]
        seen = [x for lessons in asked.values() for x in lessons if x.target not in self.unseen.names]
        self.questions = [lesson for lesson in seen if lesson.kind == "question"]
        self.regions = [lesson for lesson in seen if lesson.kind == "region"]
        self.places = [lesson for lesson in self.questions if asks_for_a_place(lesson)]
        texts = {
            "photographs": {text for texts in self.said.values() for text in texts},
            "names": answers | {self.drawings[number].name for number in self.gallery.drawings},
            "classes": {name for names in self.classes for name in names},
        }
        self.banks = {name: sorted(found) for name, found in texts.items()}
        self.banks["all"] = list(dict.fromkeys([*(t for bank in self.banks.values() for t in bank), *self.general]))

    def batch(self, size: int) -> list[Lesson]:
        """Lessons of random kinds."""
        draw = {
            "photograph": self.photograph, "described": self._described, "name": self._name, "object": self._object,
            "text": self._text, "question": self._question, "edit": self._edit, "region": self._region,
            "part": self._part, "view": self._view,
        }  # fmt: skip
        return [draw[kind]() for kind in self.rng.choices(list(SHARES), list(SHARES.values()), k=size)]

    def photograph(self) -> Lesson:
        """A version of a random photograph, and one of its texts."""
        number = self.rng.choice(self.shown)
        texts = self.said[number]
        prompt = CAPTION.format(self.rng.choice(IMAGES[:3])) if self.rng.random() < 0.5 else self.rng.choice(ALONE)
        image = self.rng.choice(self.gallery.photographs[number])
        return Lesson("photograph", prompt, image, "photographs", self.rng.choice(texts), tuple(texts), (), number)

    def _described(self) -> Lesson:
        number = self.rng.choice(self.shown)
        one, other = self.rng.sample(self.gallery.photographs[number], 2)
        texts = tuple(self.said[number])
        words = " ".join(self.rng.sample(texts, self.rng.randint(1, len(texts))))
        shown = (DESCRIBED.format(self.rng.choice(("image", "product image", "wikipedia image")), words), other)
        return Lesson("described", self.rng.choice(ENTRY), one, "", texts[0], texts, (), number, shown)

    def _name(self) -> Lesson:
        number = self.rng.choice(self.named if self.rng.random() < 0.8 or not self.tones else self.tones)
        name, kind = self.drawings[number].name, self.rng.random()
        prompt = self._identify() if kind < 0.45 else CAPTION.format("image") if kind < 0.65 else self.rng.choice(ALONE)
        return Lesson("name", prompt, self.rng.choice(self.gallery.drawings[number]), "names", name, (name,))

    def _object(self) -> Lesson:
        number, seen = self.rng.choice(self.objects)
        names = self.classes[seen]
        image = self.rng.choice(self.gallery.photographs[number][:3])
        return Lesson("object", self._identify(), image, "classes", self.rng.choice(names), names)

    def _part(self) -> Lesson:
        number, part, seen = self.rng.choice(self.parts)
        names, whole = self.classes[seen], self.gallery.photographs[number][0]
        name = self.rng.choice(names)
        shown = (self.rng.choice(CROPPED), part)
        return Lesson("part", SELECT.format(name), whole, "", name, names, (), number, shown)

    def _view(self) -> Lesson:
        number = self.rng.choice(self.shown)
        one, other = self.rng.sample(self.gallery.photographs[number], 2)
        texts = tuple(self.said[number])
        return Lesson("view", SIMILAR, one, "", texts[0], texts, (), number, (IMAGE, other))

    def _text(self) -> Lesson:
        bank = self.rng.choices(("photographs", "names", "all"), (0.4, 0.15, 0.45))[0]
        text = self.rng.choice(self.banks[bank] if bank != "all" else self.general)
        asked = self.rng.choice(FIND).format(self.rng.choice(IMAGES), text) if self.rng.random() < 0.65 else text
        return Lesson("text", asked, None, "all", text, (text,))

    def _question(self) -> Lesson:
        return self.rng.choice(self.places if self.rng.random() < 0.65 else self.questions)

    def _region(self) -> Lesson:
        return self.rng.choice(self.regions)

    def _edit(self) -> Lesson:
        number = self.rng.choice(self.tones)
        tone, name = self.drawings[number].keywords[1], self.drawings[number].name
        prompt = EDIT.format(self.rng.choice(("image", "emoji", "drawing")), tone)
        plain, toned = (self.gallery.drawings[one][0] for one in (self.plain[self._base(number)], number))
        return Lesson("edit", prompt, plain, "names", name, (name,), (), -2 - number, (IMAGE, toned), (IMAGE, plain))

    def _identify(self) -> str:
        return f"<|image_1|>\n{self.rng.choice(IDENTIFY).format(self.rng.choice(KINDS))}\n"

    def _base(self, number: int) -> str:
        """Name of the drawing without the skin tone; "" for others."""
        drawing = self.drawings[number]
        return drawing.keywords[0] if drawing.source == "tones" and drawing.keywords else ""

    def _asked(self, image: int, rows: Sequence[tuple[str, str]]) -> Iterator[Lesson]:
        """Yields the questions and regions of a composed image."""
        kept = [row for row in rows if row[0] not in NAME_PROMPTS and f"{row[0]} {row[1]}" not in self.unseen.demo]
        shown = tuple(dict.fromkeys(answer for _, answer in kept if answer not in PLACES))
        for asked, answer in kept:
            beside = tuple(name for name in shown if name != answer)
            if label := LABELLED.match(asked):
                prompt, kind = SELECT.format(label[1]), "region"
            elif PLACED.match(asked):
                prompt, kind = FOLLOW.format(asked), "region"
            else:
                prompt, kind = ASK.format(asked), "question"
            yield Lesson(kind, prompt, image, "names", answer, (answer,), beside)


def asks_for_a_place(lesson: Lesson) -> bool:
    """Whether a question names a place, such as "What is in the top left?"."""
    return not NOT_A_PLACE.search(lesson.prompt.split(": ")[1])


def briefly(texts: Sequence[str]) -> list[str]:
    """The distinct texts, each cut at a word to the length of a caption."""
    return list(dict.fromkeys(textwrap.shorten(text, LONGEST, placeholder="") for text in texts))
