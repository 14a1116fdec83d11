"""The lessons of `compact`, their losses, both stages of training, and the file that ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pretraining import teach_sentence
from pretraining.captions import Drawing
from pretraining.lesson_images import PARTS, gallery
from pretraining.lesson_losses import TEMPERATURE, TEXT_WEIGHT, Answers, ImageQueue, answer_loss, beside_loss
from pretraining.lessons import SHARES, Lesson, Lessons, Unseen
from pretraining.teach_names import name_loss, named_cells, named_drawings, teach_names
from pretraining.teach_sentence import Pupil, hold_out, scores, sure_classes, train
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact import weights
from vlm2vec.models.backbones.compact.model import Compact, new_model
from vlm2vec.models.backbones.compact.parts import VISION_DIM, EfficientNetLite, load_sentence_encoder
from vlm2vec.models.backbones.compact.weights import load_pretrained, write_pretrained
from vlm2vec.models.pooling import mean
from vlm2vec.types import EmbeddingInput

NAMES = ["apple", "boat", "car", "dice", "eye", "fish", "goat", "hat", "ink", "jar"]
SETTINGS = {"num_layers": 1, "visual_tokens": 9, "image_size": 64}


class Nothing:
    """No name is held out."""

    def __contains__(self, words: str) -> bool:
        return False


class Colors(torch.nn.Module):
    """A vision encoder whose features are the pixels of each cell."""

    def forward(self, images: Sequence[ImageRef]) -> torch.Tensor:
        pixels = np.stack([np.asarray(image.load().resize((63, 63)), dtype=np.float32) for image in images]) / 255 - 0.5
        cells = torch.from_numpy(pixels).view(len(images), 3, 21, 3, 21, 3).permute(0, 1, 3, 2, 4, 5)
        return F.pad(cells.reshape(len(images), 9, -1), (0, VISION_DIM - 21 * 21 * 3))


def noise(seed: int) -> ImageRef:
    rng = np.random.default_rng(seed)
    return ImageRef.of(Image.fromarray(np.tile(rng.integers(0, 200, (4, 4, 3), dtype=np.uint8), (10, 10, 1))))


@pytest.fixture(scope="module")
def lessons() -> Lessons:
    drawings = [Drawing("emoji", noise(i), name) for i, name in enumerate(NAMES)]
    drawings += [Drawing("clipart", noise(20 + i), f"red {name}") for i, name in enumerate(NAMES)]
    drawings.append(Drawing("tones", noise(50), "goat with dark skin tone", ("goat", "dark skin tone")))
    photographs = [*(noise(100 + i) for i in range(4)), ImageRef(data=b"no image")]
    images = gallery(photographs, drawings, 40, Colors())
    said = {number: [f"photograph {number}", f"what {number} shows"] for number in images.photographs}
    unseen = Unseen(frozenset({3}), frozenset({"jar"}), frozenset(range(8)), Nothing())  # type: ignore[arg-type]
    parts = [(number, images.parts[number][0], 7 + number) for number in range(3)]
    return Lessons(images, said, drawings, [(0, 5), (1, 7)], parts, ["a long sentence", "another one"], unseen)


def random_vectors(texts: Sequence[str]) -> torch.Tensor:
    return F.normalize(torch.randn(len(texts), 384, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_each_image_has_its_rows_and_unreadable_ones_are_left_out(lessons: Lessons) -> None:
    images = lessons.gallery
    assert sorted(images.photographs) == [0, 1, 2, 3] and all(len(rows) == 4 for rows in images.photographs.values())
    assert [len(images.drawings[number]) for number in range(21)] == [2] * 20 + [1]
    every = [row for rows in (*images.photographs.values(), *images.drawings.values()) for row in rows]
    every += [row for row, _ in images.scenes.values()] + [row for rows in images.parts.values() for row in rows]
    assert sorted(images.parts) == [0, 1, 2, 3] and all(len(rows) == PARTS for rows in images.parts.values())
    assert sorted(every) == list(range(len(images.features_NTF)))
    whole = Colors()([lessons.drawings[4].image]).half()[0]
    assert torch.equal(images.features_NTF[images.drawings[4][0]], whole)


def test_no_lesson_shows_what_is_held_out(lessons: Lessons) -> None:
    batch = lessons.batch(2000)
    assert {lesson.kind for lesson in batch} == set(SHARES)
    assert 3 not in {lesson.group for lesson in batch}
    hidden_rows = {*lessons.gallery.photographs[3], *lessons.gallery.parts[3]}
    assert not hidden_rows & {row for lesson in batch for row in (lesson.image, *(lesson.shown or ())[1:])}
    assert "jar" not in {lesson.target for lesson in batch if lesson.kind in ("name", "question", "region")}
    hidden = {lessons.gallery.scenes[number][0] for number in range(8)}
    assert not hidden & {lesson.image for lesson in batch}
    assert hidden >= {lesson.image for lesson in lessons.asked_unseen} != set()
    for lesson in batch:
        assert not lesson.bank or set(lesson.right) <= set(lessons.banks[lesson.bank])
        assert lesson.target in lesson.right and (lesson.bank or lesson.shown)
        assert (lesson.image is None) == ("<|image_1|>" not in lesson.prompt) and lesson.target not in lesson.beside


def test_answers_that_are_images_belong_to_their_lessons(lessons: Lessons) -> None:
    images = lessons.gallery
    for lesson in lessons.batch(2000):
        row = lesson.shown[1] if lesson.shown else None
        if lesson.kind == "part":
            assert lesson.image == images.photographs[lesson.group][0] and row in images.parts[lesson.group]
        elif lesson.kind in ("view", "described"):
            assert lesson.image != row and {lesson.image, row} <= set(images.photographs[lesson.group])
        elif lesson.kind == "edit":
            assert (row, lesson.image) == (images.drawings[20][0], images.drawings[NAMES.index("goat")][0])
            assert lesson.wrong == ("<|image_1|>\nRepresent the given image.\n", lesson.image)
        else:
            assert row is None


def test_the_first_stage_knows_which_drawing_is_in_which_cell(lessons: Lessons) -> None:
    for row, cell, name in named_cells(lessons):
        questions = next(rows for image, rows in lessons.gallery.scenes.values() if image == row)
        place = ("top left", "top middle", "top right", "middle left", "center", "middle right",
                 "bottom left", "bottom middle", "bottom right")[cell]  # fmt: skip
        assert any(place in asked and answer == name for asked, answer in questions)
    assert {name for _, name in named_drawings(lessons)} == {
        *NAMES[:-1],
        *(f"red {name}" for name in NAMES),
        "goat with dark skin tone",
    }


def test_losses_have_their_closed_forms() -> None:
    answers = Answers({"names": ["a", "b", "c"], "all": ["a", "b", "c", "d"]}, random_vectors)
    vectors_BD = random_vectors(["x", "y", "z"])
    batch = [
        Lesson("name", "", 0, "names", "a", ("a", "b"), ("c",)),
        Lesson("text", "", None, "all", "d", ("d",)),
        Lesson("question", "", 0, "names", "c", ("c",), ("a", "b")),
    ]
    scores_BA = vectors_BD @ answers.vectors_AD.T / TEMPERATURE
    names = scores_BA[:, :3].softmax(dim=1)
    text = -scores_BA[1].log_softmax(dim=0)[3] + TEXT_WEIGHT * (1 - scores_BA[1, 3] * TEMPERATURE)
    expected = torch.stack([-(names[0, 0] + names[0, 1]).log(), text, -names[2, 2].log()])
    torch.testing.assert_close(answer_loss(vectors_BD, batch, answers), expected)
    found = beside_loss(vectors_BD, batch, answers)
    torch.testing.assert_close(found[0], -scores_BA[0, [0, 2]].log_softmax(dim=0)[0])
    assert found[1] == 0
    torch.testing.assert_close(found[2], expected[2])
    torch.testing.assert_close(name_loss(vectors_BD[:1], ["b"], answers), -names[0, 1].log())


def test_another_version_of_a_photograph_is_no_wrong_answer() -> None:
    answers = Answers({"photographs": ["a", "b"], "all": ["a", "b"]}, random_vectors)
    vectors_BD = random_vectors(["x", "y", "z"])
    batch = [Lesson("photograph", "", 0, "photographs", name, (name,), (), i) for i, name in enumerate("ab")]
    queue = ImageQueue(vectors_BD[2:], torch.tensor([1]))
    scores = answers.vectors_AD @ vectors_BD.T / TEMPERATURE
    expected = torch.stack([-scores[0].log_softmax(dim=0)[0], -scores[1, :2].log_softmax(dim=0)[1]])
    torch.testing.assert_close(queue.text_loss(vectors_BD[:2], batch, answers), expected)
    assert torch.equal(queue.vectors_QD, vectors_BD) and queue.groups_Q.tolist() == [0, 1, 1]
    assert len(queue.text_loss(vectors_BD[:0], [], answers)) == 0


def test_a_lesson_with_a_wrong_image_is_also_compared_with_it() -> None:
    asked_PD, right_PD, wrong_WD = random_vectors(list("abcdef")).split([2, 3, 1])
    batch = [
        Lesson("edit", "", 0, "names", "a", ("a",), (), -2, ("", 0), ("", 1)),
        Lesson("part", "", 0, "", "b", ("b",), (), 1, ("", 2)),
    ]
    queue = ImageQueue(right_PD[2:], torch.tensor([5]))
    scores = asked_PD @ right_PD.T / TEMPERATURE
    first = torch.cat([scores[0], asked_PD[:1] @ wrong_WD[0] / TEMPERATURE])
    expected = torch.stack([-first.log_softmax(dim=0)[0], -scores[1].log_softmax(dim=0)[1]])
    torch.testing.assert_close(queue.loss(asked_PD, right_PD[:2], batch, wrong_WD), expected)
    assert len(queue.loss(asked_PD[:0], right_PD[:0], [])) == 0


def test_both_stages_learn_and_the_file_gives_the_trained_model_back(
    lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vision = EfficientNetLite(64, 9)
    encoder, tokenizer = load_sentence_encoder(1, torch.float32)
    answers = Answers(lessons.banks, random_vectors)
    model = new_model(vision, encoder, tokenizer, torch.randn(1000, 384), dropout=0.1)
    cells = named_cells(lessons)
    features = torch.stack([lessons.gallery.features_NTF[row, cell] for row, cell, _ in cells]).float().unsqueeze(1)
    untaught = name_loss(model.bypass.eval()(features), [name for _, _, name in cells], answers)
    teach_names(model.bypass, lessons, answers, steps=12)
    assert name_loss(model.bypass(features), [name for _, _, name in cells], answers) < untaught - 0.5
    pupil = Pupil(Compact(model, tokenizer, SETTINGS), lessons.gallery)
    monkeypatch.setattr(teach_sentence, "WARMUP", 1)
    fixed = lessons.batch(48)

    @torch.no_grad()
    def loss() -> float:
        return float(answer_loss(pupil.encode([(one.prompt, one.image) for one in fixed]), fixed, answers).mean())

    before = loss()
    assert len(list(train(pupil, lessons, answers, 8))) == 8
    assert loss() < before - 0.1
    assert set(scores(pupil, lessons, answers)) >= {"photograph@1", "photograph@10", "answer"}
    write_pretrained(pupil.weights(), tmp_path / "pretrained.safetensors")
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "pretrained.safetensors")
    again = Compact.load("compact", torch.float32, **SETTINGS)
    ids, mask = torch.tensor([again._token_ids(EmbeddingInput("a red hat"))[0]]), torch.ones(1, 5, dtype=torch.long)
    with torch.inference_mode():
        found = again.model(ids, mask, None)
        expected = pupil.model.eval()(ids, mask, None)
        plain = load_sentence_encoder(1, torch.float32)[0](input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-2)
    assert (mean(found, mask) - mean(plain, mask)).norm() > 10 * (mean(found, mask) - mean(expected, mask)).norm()


def test_another_grid_keeps_the_words_of_its_places() -> None:
    vision = EfficientNetLite(64, 4)
    encoder, tokenizer = load_sentence_encoder(1, torch.float32)
    tensors = weights.shipped_weights()
    model = new_model(vision, encoder, tokenizer, tensors.pop("class_sentences"))
    places_TD = model.projector.positions.clone()
    load_pretrained(model, tensors)
    assert torch.equal(model.projector.positions, places_TD)


def test_photographs_are_held_out_as_in_the_training_of_the_bypass_and_sure_classes_are_sure() -> None:
    unseen = hold_out(1000, [f"name {i}" for i in range(300)], Nothing())  # type: ignore[arg-type]
    torch.manual_seed(0)
    assert unseen.photographs == set(torch.randperm(1000)[:300].tolist())
    vision = torch.nn.Module()
    vision.classifier = torch.nn.Linear(1280, 1000)
    torch.nn.init.zeros_(vision.classifier.weight)
    features_NTF = torch.zeros(2, 9, VISION_DIM)
    assert sure_classes(features_NTF, vision) == {}  # type: ignore[arg-type]
    with torch.no_grad():
        vision.classifier.bias[7] = 20
    assert sure_classes(features_NTF, vision) == {0: 7, 1: 7}  # type: ignore[arg-type]
