"""Plans the demo benchmark emoji-mmeb: which emoji are seen or held out, and the rows of its subsets.

This module reads no files and renders no images. It describes an image as a list of drawings with positions, and
`prepare.py` renders it. The leak rules (which drawing may occur in which subset) can therefore be tested on the plan.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Digests = Mapping[str, Mapping[str, str]]
CELL, CANVAS = 64, 192  # side of a single drawing and of a composed image, in pixels
SEEN_VENDORS, HELD_OUT_VENDOR = ("noto", "twemoji"), "fluent"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
         "1F3FF": "dark"}  # fmt: skip
HELD_OUT_SHARE, RESERVED_SHARE = 0.22, 0.18
NUM_EVAL, NUM_EDIT_BASES, NUM_EDIT_PAIRS, NUM_GRIDS, NUM_SHEETS = 200, 40, 1000, 800, 600

NAME_QUERY = "<|image_1|>\nIdentify the emoji shown in the image\n"
T2I_QUERY = "Find me an emoji that matches the given description: {}\n"
EDIT_QUERY = "<|image_1|>\nFind the same emoji with the described change: with {} skin tone\n"
VQA_QUERY = "<|image_1|>\nRepresent the given image with the following question: {}\n"
CORNER_QUESTION, NEIGHBOUR_QUESTION = "What is in the {} corner?", "What is {} the {}?"
SELECT_QUERY = "<|image_1|>\nSelect the portion of the image that "
LABEL_QUERY = SELECT_QUERY + 'isolates the object labeled as "{}"\n'
PLACE_QUERY = SELECT_QUERY + 'follows the language expressions. "the emoji in the {}"\n'
IMAGE_TARGET = "<|image_1|>\nRepresent the given image.\n"
CROP_TARGET = "<|image_1|>\nRepresent the given cropped image of the object\n"
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIDES = ("left of", "right of", "above", "below")
PLACES = ("top left", "top middle", "top right", "middle left", "center", "middle right", "bottom left",
          "bottom middle", "bottom right")  # fmt: skip
FIXED_TEXTS = (NAME_QUERY, T2I_QUERY, EDIT_QUERY, VQA_QUERY, CORNER_QUESTION, NEIGHBOUR_QUESTION, LABEL_QUERY,
               PLACE_QUERY, IMAGE_TARGET, CROP_TARGET, *TONES.values(), *CORNERS, *SIDES, *PLACES)  # fmt: skip

# First, subcategories whose names cannot be guessed from an unseen drawing, or whose drawings hardly differ. Then,
# names of near copies of another emoji (in at least one vendor's set) and of genderless variants with another name.
_DROPPED = (
    "country-flag;subdivision-flag;alphanum;keycap;skin-tone;time;family;gender;geometric;arrow;math;zodiac;"
    "punctuation;currency;av-symbol;other-symbol;transport-sign;person with pouting face;water polo;haircut;"
    "imp;snowman without snow;woman with bunny ears;smiling cat face with open mouth;right anger bubble;"
    "six pointed star with middle dot;speaker with one sound wave;left speech bubble;woman pouting;rowboat;"
    "right-pointing magnifying glass;adult;child;older adult;surfer;swimmer;person doing cartwheel;handball;"
    "bicyclist;mountain bicyclist;pedestrian;runner;guardsman;wrestlers;face massage;man pouting;face palm;"
    "information desk person;face with no good gesture;face with ok gesture;person bowing deeply;snowboarder;"
    "happy person raising one hand;merperson;bride with veil;man with turban;bearded person;shrug"
)
# These show too little skin to distinguish two tones in the drawings of every vendor.
_TONELESS = re.compile("sleeping acc|golfing|horse racing|super(hero|villain)|^bath$|levitating")
# Rewrites to everyday names, applied in this order; the last two remove words that describe nothing visible.
_REWRITES = {
    "\N{RIGHT SINGLE QUOTATION MARK}": "'", r"\b(wo)?mans\b": r"\1man's", "(.*): bald": r"bald \1",
    "heavy black heart": "red heart", r"black (?=\w+ suit|scissors|telephone)": "", "waving (?=black)": "",
    "white (?=smiling)|left-pointing (?=mag)": "", "black sun with rays": "sun", "white medium star": "star",
    r"white (\w+) pointing (backhand )?index": r"\2index pointing \1", "black nib": "pen nib", ": ": " with ",
    "reversed hand with middle finger extended": "middle finger", "fisted hand sign": "fist", "maize": "corn",
    "playing card black joker": "joker card", "mahjong tile red dragon": "mahjong tile", "hocho": "kitchen knife",
    "extraterrestrial alien": "alien", "father christmas": "santa claus", "mother christmas": "mrs claus",
    "octagonal sign": "stop sign", "construction sign": "roadblock", "sleeping symbol": "zzz",
    "aubergine": "eggplant", "moyai": "moai statue",
    "^pouting face": "furious face", "police cars revolving": "police", "^dancer": "woman dancing",
    "no entry sign": "prohibited", r"(?<!peace)(?<!atom) symbol\b": "", r"(?<!warning)(?<!stop) sign\b": "",
}  # fmt: skip
_GENDERED = re.compile(r"\b(wo)?m[ae]n\b")
_NOT_CONCEPT = re.compile(r"\b((wo)?m[ae]ns?|boy|girl|male|female|person|people|face|oncoming)\b")
_ALIASES = {"princess": "prince", "mermaid": "merman", "mrs claus": "santa claus", "mx claus": "santa claus"}


@dataclass(frozen=True)
class Image:
    """An image to render: `parts` are (drawing key, left, top, side) on a white square of `size` pixels."""

    name: str
    size: int
    parts: tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Emoji:
    """An emoji in the drawing of `vendor` ("" for any vendor); `tones` are its skin tones as (tone, code)."""

    code: str
    name: str
    concept: str
    tones: tuple[tuple[str, str], ...] = ()
    vendor: str = ""

    def image(self, code: str = "") -> Image:
        """Returns the image that shows only this drawing, or its skin tone `code`."""
        key = f"{self.vendor}-{code or self.code}"
        return Image(key, CELL, ((key, 0, 0, CELL),))


# Query text, query image, text and image of the correct answer, and a wrong answer ("" for none).
Item = tuple[str, Image | None, str, Image | None, str]


@dataclass
class Subset:
    """A subset: its rows as stored in the parquet file, and its images by zip member."""

    name: str
    meta_task: str
    split: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, Image] = field(default_factory=dict)

    def path(self, image: Image | None) -> str:
        """Registers `image` and returns the path for the row ("" for no image)."""
        if image is None:
            return ""
        # The evaluation subsets share one zip, which holds each drawing once for all of them.
        train, own = self.split == "train", image.size == CANVAS
        folder = f"{self.name}/Train" if train else self.name if own else "Emoji"
        self.images[f"{folder}/{image.name}.png"] = image
        return f"{'images/' if train else ''}{folder}/{image.name}.png"

    def add_train(self, items: Iterable[Item]) -> "Subset":
        """Adds a training row for each item."""
        for query, shown, text, image, wrong in items:
            row = {"qry": query, "qry_image_path": self.path(shown), "pos_text": text}
            row |= {"pos_image_path": self.path(image), "neg_text": wrong, "neg_image_path": ""}
            self.rows.append(row)
        return self

    def add_eval(self, items: Iterable[Item], pool: Sequence[tuple[str, Image | None]]) -> "Subset":
        """Adds a query for each item; its candidates are the shared pool with the correct answer first."""
        for query, shown, *gold, _ in items:
            texts, images = zip(gold, *(other for other in pool if other != tuple(gold)), strict=True)
            row: dict[str, Any] = {"qry_text": query, "qry_img_path": self.path(shown)}
            row |= {"tgt_text": list(texts), "tgt_img_path": [self.path(image) for image in images]}
            self.rows.append(row)
        return self


def words(text: str) -> str:
    """Returns the words of `text`, each surrounded by spaces, so that `in` matches whole words only."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower().replace(chr(39), '')))} "


def plain_code(unified: str) -> str:
    """Returns the lower-case code points without the variation selector, which file names use inconsistently."""
    return "-".join(point for point in unified.lower().split("-") if point != "fe0f")


def build_catalogue(entries: Sequence[Mapping[str, Any]], digests: Digests) -> list[Emoji]:
    """Returns the emoji of `emoji.json` that all vendors draw, each with a distinct `digests[vendor][code]`."""
    chosen: dict[str, tuple[Emoji, Mapping[str, Any]]] = {}
    seen, dropped = set[tuple[str, str]](), set(_DROPPED.split(";"))
    for entry in entries:
        raw = name = str(entry["name"]).lower()
        for pattern, better in _REWRITES.items():
            name = re.sub(pattern, better, name)
        if name in chosen or not dropped.isdisjoint((raw, entry["subcategory"])):
            continue
        code = plain_code(entry["unified"])
        if _claim([code], digests, seen):
            concept = words(_NOT_CONCEPT.sub("", words(name))).strip()
            emoji = Emoji(code, name, _ALIASES.get(concept, concept))
            chosen[name] = (emoji, entry.get("skin_variations") or {})
    gendered = {emoji.concept for emoji, _ in chosen.values() if _GENDERED.search(emoji.name)} - {""}
    kept = []
    for emoji, variations in chosen.values():
        if emoji.concept in gendered and not _GENDERED.search(emoji.name):
            continue  # looks almost like the man or the woman of the same concept
        codes = [plain_code(variations[tone]["unified"]) for tone in TONES if tone in variations]
        toned = len(codes) == len(TONES) and not _TONELESS.search(emoji.name) and _claim(codes, digests, seen)
        kept.append(replace(emoji, tones=tuple(zip(TONES.values(), codes, strict=True)) if toned else ()))
    return kept


def split_emoji(emojis: Sequence[Emoji]) -> dict[str, list[Emoji]]:
    """Splits the drawings into `train`, `ind_test` (seen names, unseen drawings) and `held_out` (unseen names).

    The split is by concept, so that no training text contains a held-out name.
    """
    texts = [(emoji.concept, words(emoji.name)) for emoji in emojis]
    fixed = [words(text) for text in FIXED_TEXTS]
    # Holding out a name that many others contain ("man", "heart") would hold out all of those, too; so it stays in.
    held = {concept for concept, _ in texts if concept and _unit("held-out", concept) < HELD_OUT_SHARE}
    for concept, name in texts:
        num_others = sum(name in text for other, text in texts if other != concept)
        if num_others > 2 or any(name in text for text in fixed):
            held.discard(concept)
    leaks = held
    while leaks:
        names = [name for concept, name in texts if concept in held]
        leaks = {c for c, text in texts if c not in held and any(name in text for name in names)}
        held = held | leaks
    split: dict[str, list[Emoji]] = {"train": [], "ind_test": [], "held_out": []}
    for emoji in emojis:
        if emoji.concept in held:
            split["held_out"].append(replace(emoji, vendor=HELD_OUT_VENDOR))
            continue
        reserved = SEEN_VENDORS[_unit("vendor", emoji.concept) < 0.5]
        for vendor in SEEN_VENDORS:
            test = vendor == reserved and _unit("reserved", emoji.concept) < RESERVED_SHARE
            split["ind_test" if test else "train"].append(replace(emoji, vendor=vendor))
    return split


def plan_subsets(split: Mapping[str, Sequence[Emoji]]) -> list[Subset]:
    """Plans the five training subsets and the ten evaluation subsets."""
    train = split["train"]
    naming, finding = _single_items(train)
    subsets = [
        Subset("EmojiName", "classification", "train").add_train(naming),
        Subset("EmojiT2I", "retrieval", "train").add_train(finding),
        Subset("EmojiEdit", "retrieval", "train").add_train(_edit_items(train, 9999)[:NUM_EDIT_PAIRS]),
        Subset("EmojiVQA", "vqa", "train").add_train(_vqa_items(train, "train", NUM_GRIDS)),
        Subset("EmojiSheet", "grounding", "train").add_train(_sheet_items(train, "train", NUM_SHEETS)),
    ]
    for prefix, side, drawings in (("Emoji", "ind", split["ind_test"]), ("Fluent", "ood", split["held_out"])):
        few = _by_hash(drawings, side)[:NUM_EVAL]
        edits = _edit_items(drawings, NUM_EDIT_BASES)[:NUM_EVAL]
        bases = dict.fromkeys(shown for _, shown, *_ in edits)
        toned = [(text, drawn) for _, _, text, drawn, _ in edits] + [(IMAGE_TARGET, base) for base in bases]
        names = [(drawn.name, None) for drawn in few]
        images, crops = ([(text, drawn.image()) for drawn in few] for text in (IMAGE_TARGET, CROP_TARGET))
        naming, finding = _single_items(few)
        vqa, sheets = (plan(few, side, NUM_EVAL // 2) for plan in (_vqa_items, _sheet_items))
        subsets += [
            Subset(f"{prefix}Name", "classification", side).add_eval(naming, names),
            Subset(f"{prefix}T2I", "retrieval", side).add_eval(finding, images),
            Subset(f"{prefix}Edit", "retrieval", side).add_eval(edits, toned),
            Subset(f"{prefix}VQA", "vqa", side).add_eval(vqa, names),
            Subset(f"{prefix}Sheet", "grounding", side).add_eval(sheets, crops),
        ]
    return subsets


def _unit(*parts: str) -> float:
    """Returns a number in [0, 1) that depends only on the words, not on the machine or the Python version."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:6], "big") / 2**48


def _by_hash(drawings: Sequence[Emoji], salt: str) -> list[Emoji]:
    return sorted(drawings, key=lambda drawn: _unit("order", salt, drawn.vendor, drawn.code))


def _claim(codes: Sequence[str], digests: Digests, seen: set[tuple[str, str]]) -> bool:
    """Marks the drawings of `codes` as used; returns False if a vendor lacks a drawing or uses it for two emoji."""
    keys = [(vendor, drawings.get(code, "")) for vendor, drawings in digests.items() for code in codes]
    if len(set(keys)) < len(keys) or any(not digest or (vendor, digest) in seen for vendor, digest in keys):
        return False
    seen.update(keys)
    return True


def _single_items(drawings: Iterable[Emoji]) -> tuple[list[Item], list[Item]]:
    """Returns the items that map image to name, and those that map name to image."""
    names: list[Item] = [(NAME_QUERY, drawn.image(), drawn.name, None, "") for drawn in drawings]
    return names, [(T2I_QUERY.format(text), None, IMAGE_TARGET, shown, "") for _, shown, text, *_ in names]


def _edit_items(drawings: Sequence[Emoji], num_bases: int) -> list[Item]:
    bases = _by_hash([drawn for drawn in drawings if drawn.tones], "edit")[:num_bases]
    pairs = [(drawn, tone, code) for drawn in bases for tone, code in drawn.tones]
    pairs.sort(key=lambda pair: _unit("edit", pair[0].vendor, pair[2]))
    return [(EDIT_QUERY.format(tone), d.image(), IMAGE_TARGET, d.image(c), "") for d, tone, c in pairs]


def _vqa_items(drawings: Sequence[Emoji], seed: str, num_images: int) -> list[Item]:
    """Composes images of four emoji by the same vendor, each with a question about a corner and about a neighbour."""
    vendors = sorted({drawn.vendor for drawn in drawings})
    by_vendor = [[drawn for drawn in drawings if drawn.vendor == vendor] for vendor in vendors]
    rng, items, half = random.Random(f"emoji-mmeb/vqa/{seed}"), list[Item](), CANVAS // 2
    for number in range(num_images):
        four, parts = rng.sample(by_vendor[number % len(vendors)], 4), []
        for place, drawn in enumerate(four):
            side = rng.randint(60, 86)
            left, top = (rng.randint(0, half - side) + half * axis for axis in (place % 2, place // 2))
            parts.append((drawn.image().name, left, top, side))
        image = Image(f"grid-{number:04d}", CANVAS, tuple(parts))
        names, corner, gold = [drawn.name for drawn in four], rng.randrange(4), rng.randrange(4)
        near = gold ^ rng.choice((1, 2))  # across or down: bit 0 is the column, bit 1 is the row
        where = SIDES[(gold > near) + 2 * (abs(gold - near) == 2)]
        neighbour = NEIGHBOUR_QUESTION.format(where, names[near])
        for question, answer in ((CORNER_QUESTION.format(CORNERS[corner]), corner), (neighbour, gold)):
            wrong = rng.choice([name for name in names if name != names[answer]])
            items.append((VQA_QUERY.format(question), image, names[answer], None, wrong))
    return items


def _sheet_items(drawings: Sequence[Emoji], seed: str, num_images: int) -> list[Item]:
    """Composes sheets of nine emoji with distinct names, each with an expression by label and by position."""
    rng, items = random.Random(f"emoji-mmeb/sheet/{seed}"), list[Item]()
    for number in range(num_images):
        # A name has at most two drawings, so eighteen drawings have at least nine names.
        nine = list({drawn.name: drawn for drawn in rng.sample(drawings, 18)}.values())[:9]
        cells = tuple((d.image().name, CELL * (i % 3), CELL * (i // 3), CELL) for i, d in enumerate(nine))
        sheet, (label, place) = Image(f"sheet-{number:04d}", CANVAS, cells), rng.sample(range(9), 2)
        items.append((LABEL_QUERY.format(nine[label].name), sheet, CROP_TARGET, nine[label].image(), ""))
        items.append((PLACE_QUERY.format(PLACES[place]), sheet, CROP_TARGET, nine[place].image(), ""))
    return items
