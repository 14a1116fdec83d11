"""The pretraining corpus of `compact`: rows of an image, a prompt and an answer, and their batches.

Shapes: B rows, L tokens, N visual tokens per image.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretraining.captions import (
    Caption,
    Drawing,
    HeldOut,
    clipart,
    edit_captions,
    emoji,
    single_captions,
    stamps,
    text_captions,
)
from pretraining.pretrain_recipe import PretrainRecipe
from pretraining.scenes import Scenes
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.vision.vision_cache import VisionCache

MAX_WORDS_TOKENS = 24
TEXT_KINDS = ("define", "repeat", "titles")


@dataclass
class Corpus:
    """The training rows by kind, and the rows of held-out images by kind."""

    train: dict[str, list[Caption]]
    held_out: dict[str, list[Caption]]


def read_corpus(recipe: PretrainRecipe, cache: VisionCache) -> Corpus:
    """Reads the drawings, composes the scenes, and drops every row with a held-out name of the demo benchmark.

    Held-out images do not appear in scenes either.
    """
    held, rng = HeldOut(recipe.demo), random.Random(recipe.seed)
    drawings = held.known([*clipart(recipe.clipart), *stamps(recipe.stamps), *emoji(recipe.demo)])
    unreadable: set[ImageRef] = set()  # a few OpenClipart files have more than 178 megapixels
    cache.warm((drawing.image for drawing in drawings), on_error=lambda image, _: unreadable.add(image))
    drawings = [drawing for drawing in drawings if drawing.image not in unreadable]
    hidden = {drawing.image for drawing in rng.sample(drawings, recipe.num_held_out)}
    shown = [drawing for drawing in drawings if drawing.image not in hidden]
    singles = list(single_captions(drawings, rng))
    scenes = list(Scenes(shown, recipe.scenes, recipe.seed).captions(recipe.num_scenes))
    cache.warm(caption.image for caption in scenes if caption.image)
    rows = [*singles, *edit_captions(recipe.demo, rng), *scenes]
    rows += text_captions(recipe.wordnet, _titles(drawings), rng)
    hidden |= set(list(dict.fromkeys(row.image for row in scenes if row.image))[-recipe.num_held_out :])
    return _divided(held.without(rows), hidden)


def _titles(drawings: Sequence[Drawing]) -> list[str]:
    return list(dict.fromkeys(words for drawing in drawings for words in (drawing.name, *drawing.keywords)))


def _divided(rows: Sequence[Caption], hidden: set[ImageRef]) -> Corpus:
    corpus = Corpus({}, {})
    for row in rows:
        side = corpus.held_out if row.image in hidden else corpus.train
        side.setdefault(row.kind, []).append(row)
    return corpus


class Rows:
    """Samples batches from the corpus and tokenizes them.

    Args:
        corpus: The rows to sample from.
        tokenizer: The tokenizer of the language model.
        image_ids: The placeholder token ids of an image.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, image_ids: list[int]) -> None:
        self.corpus, self.tokenizer, self.image_ids = corpus, tokenizer, image_ids
        self.end: int = tokenizer.eos_token_id
        answers = [_answer(row) for rows in corpus.train.values() for row in rows[:20000]]
        found = Counter(token for ids in self._ids(answers) for token in set(ids))
        self.rarity = torch.full((len(tokenizer) + 1,), math.log(len(answers)))
        for token, number in found.items():
            self.rarity[token] = math.log(len(answers) / number)

    def draw(self, step: int, recipe: PretrainRecipe) -> list[Caption]:
        """Samples the rows of a step as a pure function of seed and step, so that a resumed run sees the same rows.

        A batch contains either only rows with images or only text rows, which keeps padding low.
        """
        rng = random.Random(f"{recipe.seed}-{step}")
        if missing := set(recipe.shares) - set(self.corpus.train):
            raise UserError(f"shares: no rows of kind {sorted(missing)}; kinds present: {sorted(self.corpus.train)}")
        words = rng.random() < sum(share for kind, share in recipe.shares.items() if kind in TEXT_KINDS)
        shares = {kind: share for kind, share in recipe.shares.items() if (kind in TEXT_KINDS) == words}
        kinds = rng.choices(list(shares), weights=list(shares.values()), k=recipe.batch_size)
        return [rng.choice(self.corpus.train[kind]) for kind in kinds]

    def encode(self, rows: Sequence[Caption], answered: bool = True) -> RowBatch:
        r"""Tokenizes rows as `<image>\n{prompt}\n<end> {answer}<end>`, or without the answer.

        Text rows have no line breaks around the prompt.
        """
        prompts = self._ids([f"\n{row.prompt}\n" if row.image else row.prompt for row in rows])
        answers = self._ids([_answer(row) for row in rows])
        questions = [
            [*(self.image_ids if row.image else []), *prompt, self.end]
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        said = [[*answer, self.end] if answered else [] for answer in answers]
        length = max(len(q) + len(a) for q, a in zip(questions, said, strict=True))
        ids_BL = torch.zeros(len(rows), length, dtype=torch.long)
        mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
        for i, (question, answer) in enumerate(zip(questions, said, strict=True)):
            size = len(question) + len(answer)
            ids_BL[i, :size] = torch.tensor(question + answer)
            mask_BL[i, :size] = 1
            labels_BL[i, len(question) : size] = torch.tensor(answer, dtype=torch.long)
        ends_B = torch.tensor([len(question) - 1 for question in questions])
        return RowBatch(ids_BL, mask_BL, labels_BL, ends_B, answers)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=MAX_WORDS_TOKENS)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


@dataclass
class RowBatch:
    """Token ids, mask and labels [B, L]; position of the first end token [B]; token ids of the answers."""

    ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    labels_BL: torch.Tensor
    ends_B: torch.Tensor
    answers: list[list[int]]


def _answer(row: Caption) -> str:
    return f" {row.answer or row.prompt}"  # without an answer, the prompt itself is the target
