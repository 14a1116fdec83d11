"""Estimates the average pair of a recipe's data from a sample, for the planner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mmeb.train_rows import num_pairs
from vlm2vec.data.streams import StreamedSet
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef, open_image
from vlm2vec.planning.cost import Inputs
from vlm2vec.training.config import Recipe
from vlm2vec.training.run import pair_limit, read_sets
from vlm2vec.training.trainer import recipe_weights
from vlm2vec.types import EmbeddingInput

PER_SET = 64
"""Number of pairs that are sampled per set."""
CHARACTERS = 4
"""Characters per token, typical for English; used if the model's tokenizer is not available locally."""


def sample_inputs(recipe: Recipe) -> tuple[Inputs, str]:
    """Returns the average pair, with sets weighted as in the batches, and a line that describes its source.

    Reads only the first rows of each set and the headers of images. Videos count as 0 tokens. Without a data folder,
    returns the defaults of `Inputs`.

    Raises:
        UserError: if the data exists but is not readable.
    """
    root = recipe.data.root
    if not root.is_dir():
        assumed = Inputs()
        return assumed, f"{root}: no such folder; assumed: {_shown(assumed)}"
    sets = read_sets(recipe, PER_SET)
    weights = recipe_weights(recipe, {name: _size(recipe, name, examples) for name, examples in sets.items()})
    count, how = _tokenizer(recipe.model.base)
    parts = [(weights[name], _Sums(list(islice(examples, PER_SET)), count)) for name, examples in sets.items()]
    inputs = _mean(parts)
    return inputs, f"Sample of up to {PER_SET} pairs per set in {root} ({how}): {_shown(inputs)}"


def _size(recipe: Recipe, name: str, examples: Sequence[TrainExample]) -> int:
    """Returns the number of pairs of a set; `examples` may contain only the first ones."""
    if isinstance(examples, StreamedSet):
        return len(examples)
    size, limit = num_pairs(recipe.data.root, name, recipe.data.instructions), pair_limit(recipe, name)
    return size if limit is None else min(size, limit)


class _Sums:
    """Means of a set: tokens and images per pair for query, target and negatives; negatives per pair; image size."""

    def __init__(self, examples: Sequence[TrainExample], count: Callable[[str], int]) -> None:
        sides = [[[e.query], list(e.targets), list(e.negatives)] for e in examples]
        self.inputs = [fmean(len(side[i]) for side in sides) for i in range(3)]
        self.texts = [fmean(sum(_tokens(x, count) for x in side[i]) for side in sides) for i in range(3)]
        self.images = [fmean(sum(len(x.images) for x in side[i]) for side in sides) for i in range(3)]
        images = [image for side in sides for items in side for item in items for image in item.images]
        self.sizes = list(_sizes(images[:: max(1, len(images) // PER_SET)]))


def _mean(parts: Sequence[tuple[float, _Sums]]) -> Inputs:
    total = sum(weight for weight, _ in parts)

    def mean(values: Callable[[_Sums], float]) -> float:
        return sum(weight * values(part) for weight, part in parts) / total

    texts, images = [], []
    for side in range(3):
        number = math.ceil(mean(lambda part, side=side: part.inputs[side]))  # type: ignore[misc]
        texts += [mean(lambda part, side=side: part.texts[side]) / number] * number if number else []  # type: ignore[misc]
        images += [mean(lambda part, side=side: part.images[side]) / number] * number if number else []  # type: ignore[misc]
    sizes = [(weight * sum(part.images), size) for weight, part in parts for size in part.sizes]
    if not sizes:
        return Inputs(tuple(texts), tuple(images))
    # The cost depends on the number of pixels, so use a size with the mean area and the mean aspect ratio.
    area = sum(w * across * down for w, (across, down) in sizes) / sum(w for w, _ in sizes)
    ratio = math.exp(sum(w * math.log(across / down) for w, (across, down) in sizes) / sum(w for w, _ in sizes))
    return Inputs(
        tuple(texts), tuple(images), (max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio))))
    )


def _tokens(item: EmbeddingInput, count: Callable[[str], int]) -> int:
    return count(item.instruction or "") + count(item.text or "")


def _sizes(images: Sequence[ImageRef]) -> Iterator[tuple[int, int]]:
    for image in images:
        if image.is_rendered():  # the size of a page or video frame is known only after rendering
            yield image.load().size
            continue
        try:
            with open_image(image.read(), str(image.path or "")) as opened:
                yield opened.size
        except OSError as error:
            raise UserError(f"{image}: not a readable image ({error}); replace or remove it") from error


def _tokenizer(base: str) -> tuple[Callable[[str], int], str]:
    file = Path(base) / "tokenizer.json"
    if not file.is_file():
        return lambda text: math.ceil(len(text) / CHARACTERS), f"assuming {CHARACTERS} characters per token"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text).ids), "tokens counted"


def _shown(inputs: Inputs) -> str:
    texts = "+".join(f"{value:.0f}" for value in inputs.texts)
    images = "+".join(f"{value:.1f}" for value in inputs.images)
    return f"{texts} text tokens and {images} images of {inputs.size[0]}x{inputs.size[1]} per pair (query+target)"
