"""The first stage of `pretraining.teach_sentence`: the bypass learns the names of drawings and of cells.

Photographs are learned as before, and keep their vectors: a bypass that learns photographs alone for long forgets
what it does not see, and then finds fewer of other photographs.

Shapes: B images, D embedding dim, A names, F features.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pretraining.lesson_losses import TEMPERATURE, Answers, ImageQueue, answer_loss, share_of_rate
from pretraining.lessons import Lessons
from vlm2vec.models.backbones.compact.model import Bypass, names_of_places

STEPS, PHOTOGRAPHS, DRAWINGS, CELLS = 600, 96, 128, 224
LEARNING_RATE, WEIGHT_DECAY, WARMUP, KEEP = 1e-3, 0.5, 30, 5.0
CELL = re.compile("|".join(sorted(names_of_places(3), key=len, reverse=True)))


def named_cells(lessons: Lessons) -> list[tuple[int, int, str]]:
    """Row of a composed image, cell of a 3 x 3 grid and the name of the drawing there."""
    cells = {name: cell for cell, name in enumerate(names_of_places(3))}
    asked = ((lesson, CELL.search(lesson.prompt)) for lesson in lessons.places)
    return [(lesson.image or 0, cells[place.group()], lesson.target) for lesson, place in asked if place]


def named_drawings(lessons: Lessons) -> list[tuple[int, str]]:
    """Rows of the images of drawings with their names; a drawing counts twice, one with a skin tone once."""
    numbers = [*lessons.named, *lessons.named, *lessons.tones]
    return [(row, lessons.drawings[n].name) for n in numbers for row in lessons.gallery.drawings[n]]


def name_loss(vectors_BD: torch.Tensor, names: Sequence[str], answers: Answers) -> torch.Tensor:
    """Cross-entropy of the right name among all names."""
    scores_BA = vectors_BD @ answers.vectors_AD[answers.members["names"]].T / TEMPERATURE
    return F.cross_entropy(scores_BA, torch.tensor([answers.places["names"][name] for name in names]))


def teach_names(bypass: Bypass, lessons: Lessons, answers: Answers, steps: int = STEPS, seed: int = 0) -> None:
    """Trains the bypass in place.

    Args:
        bypass: As `pretraining.image_sentences` trained it, with dropout.
        lessons: Photographs, drawings and composed images.
        answers: Sentence vectors of texts and names.
        steps: Optimizer steps.
        seed: Of the choice of images and of dropout.
    """
    torch.manual_seed(seed)
    rng, features_NTF = random.Random(seed), lessons.gallery.features_NTF
    before = copy.deepcopy(bypass).eval()
    cells, drawings = named_cells(lessons), named_drawings(lessons)
    optimizer = torch.optim.AdamW(bypass.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    bypass.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share_of_rate(step, steps, WARMUP, 0.01)
        shown = [lessons.photograph() for _ in range(PHOTOGRAPHS)]
        images = features_NTF[[lesson.image for lesson in shown]].float()
        vectors_BD = bypass(images)
        with torch.no_grad():
            kept_BD = before(images)
        loss = KEEP * (1 - (vectors_BD * kept_BD).sum(dim=1)).mean()
        loss = loss + answer_loss(vectors_BD, shown, answers).mean()
        loss = (
            loss + ImageQueue(vectors_BD[:0].detach()).text_loss(vectors_BD, shown, answers).mean()
        )  # those of the batch
        drawn = [rng.choice(drawings) for _ in range(DRAWINGS)]
        named = bypass(features_NTF[[row for row, _ in drawn]].float())
        loss = loss + 0.5 * name_loss(named, [name for _, name in drawn], answers)
        placed = [rng.choice(cells) for _ in range(CELLS)]
        of_cells = torch.stack([features_NTF[row, cell] for row, cell, _ in placed]).float().unsqueeze(1)
        loss = loss + 0.5 * name_loss(bypass(of_cells), [name for _, _, name in placed], answers)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    bypass.eval()
