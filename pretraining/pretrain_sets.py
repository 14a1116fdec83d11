"""Converts the pretraining corpus to contrastive training sets of all four meta-tasks, for `compact-embed`.

    python -m pretraining.pretrain_sets pretraining/compact.yaml FOLDER
    vlm2vec train recipes/compact-embed.yaml data.root=FOLDER

The sets use the MMEB-train layout and MMEB's instructions. They contain no photograph of any benchmark and no held-out
name of the demo benchmark.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from pretraining.captions import KEYWORD_PROMPTS, NAME_PROMPTS, Caption
from pretraining.pretrain_data import Corpus, read_corpus
from pretraining.pretrain_recipe import PretrainRecipe
from vlm2vec.cache import cache_folder
from vlm2vec.data.mmeb.images import write_train_set
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.parts import EfficientNetLite
from vlm2vec.models.vision.vision_cache import VisionCache

IDENTIFY = ("Identify the object shown in the image", "Identify the category of the given image",
            "Classify the given image")  # fmt: skip
CAPTION = "<|image_1|>\nFind an image caption describing the given image.\n"
FIND = ("Find me an image that matches the given caption: {}\n", "Find an image of: {}\n", "{}")
ASK = "<|image_1|>\nRepresent the given image with the following question: {}\n"
SELECT = '<|image_1|>\nSelect the portion of the image that isolates the object labeled as "{}"\n'
FOLLOW = '<|image_1|>\nSelect the portion of the image that follows the language expressions. "{}"\n'
IMAGE = "<|image_1|>\nRepresent the given image.\n"
CROP = "<|image_1|>\nRepresent the given cropped image of the object.\n"
LABELLED = re.compile(r"^(?:the|Point at the|the one called) (?!one in)([^.]+?)\.?$")
PLACED = re.compile(r"^the one in the (.+)$")
Row = dict[str, str]


class Sets:
    """Builds the rows of the sets and copies their images.

    Args:
        corpus: The pretraining corpus; only its training rows are used.
        root: The output folder.
    """

    def __init__(self, corpus: Corpus, root: Path) -> None:
        self.root, self.rng = root, random.Random(0)
        self._paths: dict[ImageRef, str] = {}
        singles = [row for row in corpus.train["name"] if row.prompt not in KEYWORD_PROMPTS]
        self.singles = list({row.image: row for row in singles}.values())
        self.scenes = corpus.train["scene"]
        self.drawn: dict[str, list[Caption]] = {}
        for row in self.singles:
            self.drawn.setdefault(row.answer, []).append(row)

    def write(self) -> dict[str, int]:
        """Writes every set; returns the number of pairs in each."""
        asked = [row for row in self.scenes if row.prompt not in NAME_PROMPTS and not PLACED.match(row.prompt)]
        told = [row for row in self.scenes if row.prompt in NAME_PROMPTS]
        sets = {
            "Names": self._answers(self.singles, IDENTIFY),
            "PictureToText": [self._row(CAPTION, row.image, row.answer) for row in [*self.singles, *told]],
            "TextToPicture": list(self._finding([*self.singles, *told])),
            "Questions": [self._row(ASK.format(row.prompt), row.image, row.answer) for row in asked],
            "Regions": list(self._pointing()),
        }
        for name, rows in sets.items():
            write_train_set(self.root, name, rows)
        return {name: len(rows) for name, rows in sets.items()}

    def _answers(self, rows: Iterable[Caption], wordings: tuple[str, ...]) -> list[Row]:
        return [self._row(f"<|image_1|>\n{self.rng.choice(wordings)}\n", row.image, row.answer) for row in rows]

    def _finding(self, rows: Iterable[Caption]) -> Iterable[Row]:
        for row in rows:
            query = self.rng.choice(FIND).format(row.answer)
            yield {"qry": query, "pos_text": IMAGE, "pos_image_path": self._path(row.image)}

    def _pointing(self) -> Iterable[Row]:
        """Yields rows that map a scene, plus a label or position, to the matching drawing as a separate image."""
        for row in self.scenes:
            label, place = LABELLED.match(row.prompt), PLACED.match(row.prompt)
            if row.answer in self.drawn and (label or place):
                query = SELECT.format(label[1]) if label else FOLLOW.format(row.prompt)
                target = self._path(self.rng.choice(self.drawn[row.answer]).image)
                yield {**self._row(query, row.image, CROP), "pos_image_path": target}

    def _row(self, query: str, image: ImageRef | None, text: str) -> Row:
        return {"qry": query, "qry_image_path": self._path(image), "pos_text": text}

    def _path(self, image: ImageRef | None) -> str:
        """Copies an image into the output folder at its first use; returns its relative path."""
        assert image is not None
        if image not in self._paths:
            ending = Path(image.member or image.path or "x.png").suffix
            path = f"pictures/{len(self._paths):05d}{ending}"
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            if image.member is None and image.path:
                shutil.copyfile(image.path, self.root / path)
            else:
                (self.root / path).write_bytes(image.read())
            self._paths[image] = path
        return self._paths[image]


def main(recipe_file: str, folder: str) -> None:
    """Writes the sets and prints their sizes."""
    recipe = PretrainRecipe.model_validate(yaml.safe_load(Path(recipe_file).read_text()))
    vision = EfficientNetLite(recipe.image_size, recipe.visual_tokens)
    corpus = read_corpus(recipe, VisionCache(vision, vision.fingerprint(), cache_folder() / "vision"))
    print(Sets(corpus, Path(folder)).write())


if __name__ == "__main__":
    main(*sys.argv[1:])
