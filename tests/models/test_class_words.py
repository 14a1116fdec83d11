from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from pretraining.class_names import kind_of, read_wordnet
from vlm2vec import Embedder, UserError
from vlm2vec.models.backbones.compact.class_words import MAP_MEAN, MAP_STD, NAMES, ClassWords

LINES = NAMES.read_text().splitlines()


class Words:
    """A tokenizer of the two words that count here."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] if text.strip() in ("fish", "bird", "dog") else [0, 2] for text in texts]}


@pytest.fixture(scope="module")
def classifier() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, len(LINES))


def test_every_class_of_imagenet_has_a_line_in_the_order_of_its_synsets() -> None:
    offsets = [line.split()[0] for line in LINES]
    assert len(offsets) == 1000
    assert offsets == sorted(set(offsets))
    assert all(len(line.split(maxsplit=1)[1].split(", ")) <= 2 for line in LINES)
    assert "02085620 Chihuahua, dog" in LINES


def test_a_token_is_the_mean_of_its_classes_words_weighted_by_their_probabilities(classifier: nn.Linear) -> None:
    embeddings_VD = torch.randn(3, 5)
    words = ClassWords(classifier, embeddings_VD, Words())
    features = torch.randn(2, 4, 11)  # three more numbers than the classifier reads
    expected = torch.zeros(2, 4, 5)
    probabilities = classifier(MAP_STD * features[..., :8] + MAP_MEAN).softmax(dim=-1)
    for i, line in enumerate(LINES):
        name = embeddings_VD[[0, 2]].mean(dim=0)
        kind = line.split(", ")[1:]
        vector = name if not kind else (name + (embeddings_VD[1] if kind[0] in ("fish", "bird", "dog") else name)) / 2
        expected += probabilities[..., i, None] * vector.detach()
    torch.testing.assert_close(words(features), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_class_that_is_certain_gives_its_words_alone(classifier: nn.Linear) -> None:
    words = ClassWords(classifier, torch.randn(3, 5), Words())
    certain = 1e4 * classifier.weight[7].detach()
    torch.testing.assert_close(words(certain), words.words_CD[int((classifier.weight @ certain).argmax())])


def test_class_words_are_neither_trained_nor_saved() -> None:
    projector = Embedder.from_pretrained("compact", dtype=torch.float32, num_layers=1).backbone.model.projector
    assert not list(projector.class_words.parameters())
    assert not [name for name in projector.state_dict() if "class_words" in name]


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


def test_wordnet_is_read_as_nouns_by_offset_and_words_by_definitions(tmp_path: Path) -> None:
    base = tmp_path / "usr/share/wordnet"
    base.mkdir(parents=True)
    (base / "data.noun").write_text(
        "  1 a licence\n"
        "00000010 05 n 02 hound 0 hound_dog 0 002 @ 00000020 n 0000 ~ 00000030 n 0000 | a dog that hunts; dog\n"
    )
    for part in ("verb", "adj", "adv"):
        (base / f"data.{part}").write_text("00000040 30 v 01 bark 0 000 | what a dog does\n")
    nouns, found = read_wordnet(tmp_path)
    assert nouns == {"00000010": (["hound", "hound dog"], ["00000020"])}
    assert (found["dog"], found["hunts"]) == (4, 1)
