"""The names of the vision encoder's classes, made from WordNet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pretraining import class_names
from pretraining.class_names import kind_of, names_in_wordnet, read_wordnet
from vlm2vec import UserError
from vlm2vec.models.backbones.compact.seen_classes import NAMES

LINES = NAMES.read_text().splitlines()


def write_wordnet(root: Path, nouns: str, others: str) -> None:
    base = root / "usr/share/wordnet"
    base.mkdir(parents=True)
    (base / "data.noun").write_text(nouns)
    for part in ("verb", "adj", "adv"):
        (base / f"data.{part}").write_text(others)


def test_every_class_of_imagenet_has_a_line_in_the_order_of_its_synsets() -> None:
    offsets = [line.split()[0] for line in LINES]
    assert len(offsets) == 1000
    assert offsets == sorted(set(offsets))
    assert all(len(line.split(maxsplit=1)[1].split(", ")) <= 2 for line in LINES)
    assert "02085620 Chihuahua, dog" in LINES


def test_the_kind_of_a_thing_is_the_nearest_everyday_word_above_it() -> None:
    nouns = {
        "1": (["beagle"], ["2"]),
        "2": (["hound dog"], ["3"]),
        "3": (["dog"], ["4"]),
        "4": (["whole"], []),
        "5": (["guide dog"], ["3"]),
    }
    found = Counter(dog=150, whole=900, beagle=3)
    assert kind_of("1", nouns, found) == "dog"
    assert kind_of("3", nouns, found) == ""  # what is above it is vague
    assert kind_of("5", nouns, found) == ""  # its own name says so
    assert kind_of("4", nouns, found) == ""


def test_a_folder_without_wordnet_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unpack the Debian package wordnet-base"):
        read_wordnet(tmp_path)


def test_a_class_has_all_its_names_and_its_kind_in_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wordnet(
        tmp_path,
        "03595614 06 n 03 jersey 0 T-shirt 0 tee_shirt 0 000 | a close-fitting pullover\n"
        "03630383 06 n 01 lab_coat 0 000 | a light coat\n",
        "",
    )
    names = tmp_path / "names.txt"
    names.write_text("03595614 jersey, garment\n03630383 lab coat\n")
    monkeypatch.setattr(class_names, "NAMES", names)
    assert names_in_wordnet(tmp_path) == ["jersey, T-shirt, tee shirt, garment", "lab coat"]


def test_wordnet_is_read_as_nouns_by_offset_and_words_by_definitions(tmp_path: Path) -> None:
    write_wordnet(
        tmp_path,
        "  1 a licence\n"
        "00000010 05 n 02 hound 0 hound_dog 0 002 @ 00000020 n 0000 ~ 00000030 n 0000 | a dog that hunts; dog\n",
        "00000040 30 v 01 bark 0 000 | what a dog does\n",
    )
    nouns, found = read_wordnet(tmp_path)
    assert nouns == {"00000010": (["hound", "hound dog"], ["00000020"])}
    assert (found["dog"], found["hunts"]) == (4, 1)
