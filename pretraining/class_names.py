"""Regenerates the class names of the vision encoder from WordNet, for `models/backbones/compact/seen_classes.py`.

    python -m pretraining.class_names WORDNET_FOLDER

Each line describes a class: the WordNet 3.0 offset of its synset (ImageNet's classes are synsets sorted by offset), its
first name, and after a comma its nearest hypernym with an everyday name: a single word that occurs in at least `COMMON`
of WordNet's definitions.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from pretraining.captions import wordnet_lines
from vlm2vec.models.backbones.compact.seen_classes import NAMES

COMMON = 100
# Common words that say nothing about appearance, and hypernyms whose first name is better known in another meaning.
VAGUE = {
    "area", "arm", "can", "case", "control", "course", "covering", "defense", "device", "display", "equal", "feed",
    "formation", "good", "home", "institution", "level", "light", "measure", "medicine", "mixture", "person", "piece",
    "plant", "player", "post", "produce", "spring", "stand", "structure", "support", "surface", "system", "top",
    "weight", "wheel", "whole", "wind", "wood", "work",
}  # fmt: skip
Synsets = dict[str, tuple[list[str], list[str]]]


def read_wordnet(root: Path) -> tuple[Synsets, Counter[str]]:
    """Returns the nouns by offset, as (names, offsets of their hypernyms), and the number of definitions per word.

    Raises:
        UserError: if `root` does not contain the unpacked Debian package `wordnet-base`.
    """
    nouns: Synsets = {}
    found: Counter[str] = Counter()
    for part in ("noun", "verb", "adj", "adv"):
        for fields, gloss in wordnet_lines(root, part):
            found.update(set(re.findall("[a-z]+", gloss.lower())))
            if part == "noun":
                after = 4 + 2 * int(fields[3], 16)
                names = [name.replace("_", " ") for name in fields[4:after:2]]
                pointers = zip(fields[after + 1 :: 4], fields[after + 2 :: 4], strict=False)
                nouns[fields[0]] = (names, [offset for sign, offset in pointers if sign[0] == "@"])
    return nouns, found


def kind_of(offset: str, nouns: Synsets, found: Counter[str]) -> str:
    """Returns the nearest everyday hypernym of a synset; "" if it is vague or the name already ends with it."""
    level = nouns[offset][1]
    while level:
        words = [name for above in level for name in nouns[above][0] if found[name.lower()] >= COMMON]
        if words:
            return "" if words[0] in VAGUE or words[0] == nouns[offset][0][0].split()[-1] else words[0]
        level = [offset for above in level for offset in nouns[above][1]]
    return ""


def class_lines(offsets: list[str], root: Path) -> list[str]:
    """Returns the line `offset name, kind` of every class."""
    nouns, found = read_wordnet(root)
    kinds = [kind_of(offset, nouns, found) for offset in offsets]
    return [
        f"{offset} {', '.join(filter(None, (nouns[offset][0][0], kind)))}"
        for offset, kind in zip(offsets, kinds, strict=True)
    ]


def names_in_wordnet(root: Path) -> list[str]:
    """All names of each class and its kind as one text, such as "jersey, T-shirt, tee shirt, garment"."""
    nouns, _ = read_wordnet(root)
    classes = [line.split(maxsplit=1) for line in NAMES.read_text().splitlines()]
    return [", ".join([*nouns[offset][0], *words.split(", ")[1:]]) for offset, words in classes]


if __name__ == "__main__":
    known = [line.split()[0] for line in NAMES.read_text().splitlines()]
    NAMES.write_text("\n".join(class_lines(known, Path(sys.argv[1]))) + "\n")
