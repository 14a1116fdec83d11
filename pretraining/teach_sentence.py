r"""Pretrains `compact`: an input gets the sentence vector of what it shows, or of what it asks for.

    python -m pretraining.photographs CLONES PHOTOGRAPHS
    python -m pretraining.image_sentences PHOTOGRAPHS WORDNET bypass.safetensors
    python -m pretraining.teach_sentence PHOTOGRAPHS DEMO CLIPART STAMPS WORDNET bypass.safetensors trained.safetensors
    python -m pretraining.ship trained.safetensors

The answers' vectors are all-MiniLM-L6-v2's own, so every lesson is compared with thousands of wrong answers that cost
nothing to encode. Two stages:

1. names     the bypass learns the names of drawings and of the cells of composed images (`pretraining.teach_names`)
2. lessons   LoRA on the sentence encoder, projector, bypass and choice of cells learn all lessons together

The features of 38,000 images took 25 minutes in two processes, the first stage 3, the second 27, beside other work.
Prints scores on what no lesson shows, and the checksum of the file.

Shapes: B lessons, D embedding dim.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pretraining.captions import HeldOut, clipart, definitions, emoji, stamps
from pretraining.image_sentences import HELD_OUT, sentence_vectors
from pretraining.lesson_images import Gallery, gallery, read_photographs
from pretraining.lesson_losses import Answers, ImageQueue, answer_loss, beside_loss, share_of_rate
from pretraining.lessons import FIND, IMAGE, NUM_GENERAL, Lesson, Lessons, Unseen, asks_for_a_place, briefly
from pretraining.teach_names import teach_names
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.model import DEFAULTS, Compact, new_model
from vlm2vec.models.backbones.compact.parts import FINAL_DIM, SENTENCE_LAYERS, EfficientNetLite, load_sentence_encoder
from vlm2vec.models.backbones.compact.weights import CLASSES, LORA_A, LORA_B, PARTS, write_pretrained
from vlm2vec.models.pooling import mean
from vlm2vec.types import EmbeddingInput

NUM_SCENES, UNSEEN_NAMES, UNSEEN_SCENES = 14000, 200, 250
STEPS, BATCH_SIZE, WARMUP, RANK, ALPHA, DROPOUT = 1100, 80, 80, 32, 64, 0.5
LANGUAGE_RATE, VISUAL_RATE, CHOICE_RATE, BYPASS_DECAY = 3e-4, 4e-5, 1e-3, 0.5
SURE = 0.35  # probability above which the classifier's class is the name of a photograph


class Pupil:
    """The model in training.

    Args:
        backbone: `compact` before its pretraining.
        gallery: Features of the images.
    """

    def __init__(self, backbone: Compact, gallery: Gallery) -> None:
        from peft import LoraConfig, get_peft_model

        self.backbone, self.gallery = backbone, gallery
        self.model: Any = backbone.model
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=r".*encoder.*\.(query|key|value|dense)")
        self.model.language_model = get_peft_model(self.model.language_model, config)

    def encode(self, inputs: Sequence[tuple[str, int | None]]) -> torch.Tensor:
        """Unit vectors of prompts with the rows of their images, [B, D]."""
        rows = [self._ids(prompt) for prompt, _ in inputs]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
        images = [image for _, image in inputs if image is not None]
        features = self.gallery.features_NTF[images].float() if images else None
        with torch.autocast("cpu", torch.bfloat16):
            states_BLD = self.model(ids, mask, features)
        return F.normalize(mean(states_BLD.float(), mask), dim=-1)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups with the highest learning rate of each."""
        parts = (
            (self.model.language_model, LANGUAGE_RATE, 0.01),
            (self.model.projector, VISUAL_RATE, 0.01),
            (self.model.choice, CHOICE_RATE, 0.0),
            (self.model.bypass, VISUAL_RATE, BYPASS_DECAY),
        )
        return [
            {"params": [p for p in part.parameters() if p.requires_grad], "highest": rate, "weight_decay": decay}
            for part, rate, decay in parts
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        """What ships: trained parts, the change of the sentence encoder, and the vectors of the classes."""
        found = {"class_sentences": self.model.bypass.class_sentences.vectors_CD}
        for name, value in self.model.state_dict().items():
            if LORA_A in name or LORA_B in name:
                scale = ALPHA / RANK if LORA_B in name else 1.0
                found[name.replace("base_model.model.", "").replace(".default.weight", "")] = scale * value
            elif name.partition(".")[0] in PARTS and not name.endswith(CLASSES):
                found[name] = value
        return found

    def _ids(self, prompt: str) -> list[int]:
        images = (ImageRef(data=b""),) if "<|image_1|>" in prompt else ()
        return self.backbone._token_ids(EmbeddingInput(text=prompt, images=images))[0]


def train(pupil: Pupil, lessons: Lessons, answers: Answers, steps: int, seed: int = 0) -> Iterator[float]:
    """Trains on random lessons; yields the loss of each step.

    Args:
        pupil: The model.
        lessons: What it learns.
        answers: Vectors of the answers.
        steps: Batches of `BATCH_SIZE`.
        seed: Of dropout.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(pupil.groups(), lr=0.0, betas=(0.9, 0.98))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nothing = torch.empty(0, answers.vectors_AD.shape[1])
    by_text, by_image = ImageQueue(nothing), ImageQueue(nothing)
    pupil.model.train()
    for step in range(steps):
        share = share_of_rate(step, steps, WARMUP, 0.03)
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * share
        batch = sorted(lessons.batch(BATCH_SIZE), key=lambda lesson: len(lesson.prompt))
        halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]  # less padding
        vectors_BD = torch.cat([pupil.encode([(one.prompt, one.image) for one in half]) for half in halves])
        losses = (answer_loss, beside_loss, by_text.text_loss)
        total = sum((loss(vectors_BD, batch, answers).sum() for loss in losses), vectors_BD.new_zeros(()))
        total = total + _image_loss(pupil, batch, vectors_BD, by_image).sum()
        optimizer.zero_grad()
        torch.autograd.backward(total / len(batch))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield float(total.detach()) / len(batch)
    pupil.model.eval()


def _image_loss(pupil: Pupil, batch: Sequence[Lesson], vectors_BD: torch.Tensor, queue: ImageQueue) -> torch.Tensor:
    """Losses of the lessons whose answer is an image."""
    rows = [row for row, lesson in enumerate(batch) if lesson.shown]
    chosen = [batch[row] for row in rows]
    images = [lesson.shown for lesson in chosen if lesson.shown] + [lesson.wrong for lesson in chosen if lesson.wrong]
    if not images:
        return vectors_BD.new_zeros(1)
    found_D = pupil.encode(images)
    return queue.loss(vectors_BD[rows], found_D[: len(rows)], chosen, found_D[len(rows) :])


@torch.no_grad()
def scores(pupil: Pupil, lessons: Lessons, answers: Answers) -> dict[str, float]:
    """Percent of what no lesson shows: photographs found by a text, and answers found in composed images."""
    pupil.model.eval()
    numbers = sorted(lessons.unseen.photographs & set(lessons.said))
    texts = [lessons.said[number][min(1, len(lessons.said[number]) - 1)] for number in numbers]
    asked_PD = _encoded(pupil, [(FIND[0].format("everyday image", text), None) for text in texts])
    shown_PD = _encoded(pupil, [(IMAGE, lessons.gallery.photographs[number][0]) for number in numbers])
    ranks = ((found := asked_PD @ shown_PD.T) > found.diag()[:, None]).sum(dim=1)
    asked = [lesson for lesson in lessons.asked_unseen if lesson.kind == "question" and asks_for_a_place(lesson)]
    vectors_BD = _encoded(pupil, [(lesson.prompt, lesson.image) for lesson in asked])
    names = (vectors_BD @ answers.vectors_AD[answers.members["names"]].T).argmax(dim=1).tolist()
    right = [answers.banks["names"][name] == lesson.target for name, lesson in zip(names, asked, strict=True)]
    chosen = [
        bool((answers.of([one.target, *one.beside]) @ vector_D).argmax() == 0)
        for vector_D, one in zip(vectors_BD, asked, strict=True)
    ]
    pupil.model.train()
    return {
        "photograph@1": _percent((ranks < 1).tolist()),
        "photograph@10": _percent((ranks < 10).tolist()),
        "answer": _percent(right),
        "answer among the names in the image": _percent(chosen),
    }


def _encoded(pupil: Pupil, inputs: Sequence[tuple[str, int | None]]) -> torch.Tensor:
    return torch.cat([pupil.encode(inputs[start : start + 64]) for start in range(0, len(inputs), 64)])


def _percent(hits: Sequence[bool]) -> float:
    return round(100 * sum(hits) / max(1, len(hits)), 1)


def hold_out(photographs: int, names: Sequence[str], demo: HeldOut) -> Unseen:
    """Chooses what no lesson shows; the photographs are those that `pretraining.image_sentences` holds out."""
    torch.manual_seed(0)
    held = frozenset(torch.randperm(photographs)[:HELD_OUT].tolist())
    few = frozenset(random.Random(2).sample(names, UNSEEN_NAMES))
    return Unseen(held, few, frozenset(random.Random(3).sample(range(NUM_SCENES), UNSEEN_SCENES)), demo)


def sure_classes(features_NTF: torch.Tensor, vision: EfficientNetLite) -> dict[int, int]:
    """The ImageNet class of each row of features of which the classifier is sure."""
    seen_NF = features_NTF[..., :FINAL_DIM].float().mean(dim=1)
    share_N, class_N = vision.classifier(seen_NF).softmax(dim=-1).max(dim=-1)
    return {row: int(class_N[row]) for row in (share_N > SURE).nonzero()[:, 0].tolist()}


def read_lessons(photographs: Path, demo: Path, art: Path, cut_outs: Path, wordnet: Path, vision: Any) -> Lessons:
    """Reads the images and texts, and encodes the images."""
    held, shown = HeldOut(demo), read_photographs(photographs)
    drawings = held.known([*clipart(art), *stamps(cut_outs), *emoji(demo)])
    images = gallery([image for image, _ in shown], drawings, NUM_SCENES, vision)
    unseen = hold_out(len(shown), sorted({one.name for one in drawings if one.source != "tones"}), held)
    sentences = {text for _, meaning, examples in definitions(wordnet) for text in (meaning, *examples)}
    general = sorted(text for text in sentences if text not in held)
    sure = sure_classes(images.features_NTF, vision)
    objects = [
        (number, sure[rows[0]])
        for number, rows in images.photographs.items()
        if rows[0] in sure and number not in unseen.photographs
    ]
    said = {number: briefly(shown[number][1]) for number in images.photographs}
    parts = [
        (number, row, sure[row])
        for number, rows in images.parts.items()
        if number not in unseen.photographs
        for row in rows
        if row in sure
    ]
    few = random.Random(5).sample(general, min(NUM_GENERAL, len(general)))
    return Lessons(images, said, drawings, objects, parts, few, unseen)


def main(photographs: str, demo: str, art: str, cut_outs: str, wordnet: str, bypass: str, output: str) -> None:
    """Trains both stages and writes what `pretraining.ship` puts into the package."""
    vision = EfficientNetLite(DEFAULTS["image_size"], DEFAULTS["visual_tokens"])
    lessons = read_lessons(Path(photographs), Path(demo), Path(art), Path(cut_outs), Path(wordnet), vision)
    encoder, tokenizer = load_sentence_encoder(SENTENCE_LAYERS, torch.float32)
    answers = Answers(lessons.banks, lambda texts: sentence_vectors(texts, encoder, tokenizer))
    parts = {name: value.float() for name, value in load_file(bypass).items()}
    model = new_model(vision, encoder, tokenizer, parts[f"class_sentences{CLASSES}"], DROPOUT)
    model.bypass.load_state_dict(parts)
    teach_names(model.bypass, lessons, answers)
    pupil = Pupil(Compact(model, tokenizer, DEFAULTS), lessons.gallery)
    for step, loss in enumerate(train(pupil, lessons, answers, STEPS)):
        if step % 100 == 0 or step == STEPS - 1:
            print(step, round(loss, 3), scores(pupil, lessons, answers), flush=True)
    print(write_pretrained(pupil.weights(), Path(output)))


if __name__ == "__main__":
    main(*sys.argv[1:])
