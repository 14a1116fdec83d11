"""Losses of the lessons: vectors of a model against the sentence encoder's vectors of the right and the wrong answers.

Shapes: B lessons, D embedding dim, A answers of a bank, Q vectors in a queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from pretraining.lessons import Lesson

TEMPERATURE = 0.05
TEXT_WEIGHT = 4.0  # of the cosine between a text's vector and that of the sentence encoder
QUEUE = 1024


def share_of_rate(step: int, steps: int, warmup: int, least: float) -> float:
    """Share of the highest learning rate: linear warm-up, then a cosine from 1 to `least`."""
    return min(1, (step + 1) / warmup) * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * step / steps)))


@dataclass
class Answers:
    """The sentence vectors of all answers, and which of them belong to each bank.

    Args:
        banks: The texts of each bank; "all" has every text.
        vectors_of: Sentence vectors of texts, [A, D].
    """

    banks: Mapping[str, Sequence[str]]
    vectors_of: Callable[[Sequence[str]], torch.Tensor]
    vectors_AD: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {text: row for row, text in enumerate(self.banks["all"])}
        self.vectors_AD = self.vectors_of(self.banks["all"])
        self.members = {name: torch.tensor([self.rows[t] for t in texts]) for name, texts in self.banks.items()}
        self.places = {name: {text: i for i, text in enumerate(texts)} for name, texts in self.banks.items()}

    def of(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts of the banks, [texts, D]."""
        return self.vectors_AD[[self.rows[text] for text in texts]]


def answer_loss(vectors_BD: torch.Tensor, lessons: Sequence[Lesson], answers: Answers) -> torch.Tensor:
    """Minus the log of the probability of the right answers among all of the bank, [B]; for texts also 1 - cosine."""
    losses_B = vectors_BD.new_zeros(len(lessons))
    for bank in {lesson.bank for lesson in lessons if lesson.bank}:
        rows = [row for row, lesson in enumerate(lessons) if lesson.bank == bank]
        scores = vectors_BD[rows] @ answers.vectors_AD[answers.members[bank]].T / TEMPERATURE
        right = torch.zeros_like(scores, dtype=torch.bool)
        for place, row in enumerate(rows):
            right[place, [answers.places[bank][text] for text in lessons[row].right]] = True
        found = scores.logsumexp(dim=1) - scores.masked_fill(~right, -torch.inf).logsumexp(dim=1)
        losses_B = losses_B.index_add(0, torch.tensor(rows), found)
    texts = [row for row, lesson in enumerate(lessons) if lesson.kind == "text"]
    if texts:
        cosines = (vectors_BD[texts] * answers.of([lessons[row].target for row in texts])).sum(dim=1)
        losses_B = losses_B.index_add(0, torch.tensor(texts), TEXT_WEIGHT * (1 - cosines))
    return losses_B


def beside_loss(vectors_BD: torch.Tensor, lessons: Sequence[Lesson], answers: Answers) -> torch.Tensor:
    """Minus the log of the probability of the answer among the names in the same composed image, [B]; 0 without any."""
    losses = []
    for vector_D, lesson in zip(vectors_BD, lessons, strict=True):
        scores = answers.of([lesson.target, *lesson.beside]) @ vector_D / TEMPERATURE
        losses.append(scores.logsumexp(dim=0) - scores[0])
    return torch.stack(losses)


@dataclass
class ImageQueue:
    """Vectors of the last images that were right answers, the wrong ones of what comes next."""

    vectors_QD: torch.Tensor
    groups_Q: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def text_loss(self, vectors_BD: torch.Tensor, lessons: Sequence[Lesson], answers: Answers) -> torch.Tensor:
        """Minus the log of the probability of each text's photograph, [photographs]; then queues the photographs."""
        rows = [row for row, lesson in enumerate(lessons) if lesson.kind == "photograph"]
        chosen = [lessons[row] for row in rows]
        return self.loss(answers.of([lesson.target for lesson in chosen]), vectors_BD[rows], chosen)

    def loss(
        self,
        asked_PD: torch.Tensor,
        right_PD: torch.Tensor,
        lessons: Sequence[Lesson],
        wrong_WD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Minus the log of the probability of each right image, [P]; then queues these images.

        Args:
            asked_PD: What looks for an image.
            right_PD: The images.
            lessons: Other images of the same group are no wrong answers.
            wrong_WD: An image for each lesson that names a wrong one, which is wrong for that lesson.
        """
        groups_P = torch.tensor([lesson.group for lesson in lessons], dtype=torch.long)
        groups = torch.cat([groups_P, self.groups_Q])
        scores = asked_PD @ torch.cat([right_PD, self.vectors_QD]).T / TEMPERATURE
        same_group = groups_P[:, None] == groups
        same_group.fill_diagonal_(False)
        scores = scores.masked_fill(same_group, -torch.inf)
        if wrong_WD is not None and len(wrong_WD):
            rows = torch.tensor([row for row, lesson in enumerate(lessons) if lesson.wrong])
            beside_P1 = torch.full((len(lessons), 1), -torch.inf)
            own_W1 = (asked_PD[rows] * wrong_WD).sum(dim=1, keepdim=True) / TEMPERATURE
            scores = torch.cat([scores, beside_P1.index_copy(0, rows, own_W1)], dim=1)
        losses = F.cross_entropy(scores, torch.arange(len(lessons)), reduction="none")
        self.vectors_QD = torch.cat([right_PD.detach(), self.vectors_QD])[:QUEUE]
        self.groups_Q = groups[:QUEUE]
        return losses
