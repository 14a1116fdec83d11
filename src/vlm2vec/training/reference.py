"""A frozen second model, guide or teacher, whose vectors a loss uses; each distinct input is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from vlm2vec.cache import cache_folder
from vlm2vec.data.examples import TrainExample
from vlm2vec.data.streams import StreamedSet
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.verification.fingerprint import describe
from vlm2vec.progress import progress_bar
from vlm2vec.retrieval.cache_folder import default_cache
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys, fill
from vlm2vec.retrieval.rank import Rows
from vlm2vec.training.config import Recipe
from vlm2vec.training.gather import barrier, rank, world_size
from vlm2vec.types import EmbeddingInput

FIELDS = ("guide", "teacher")
"""Keys of `loss` that name a model; the vectors are stored in the batch field of the same name."""
HELD = 64 * 512  # distinct inputs held while a set is encoded: a whole number of parts of the embedding cache


class ReferenceModel:
    """Vectors of a frozen model, stored in the embedding cache, so that a second run encodes nothing.

    Args:
        model: Any source that `Embedder.from_pretrained` accepts.
    """

    def __init__(self, model: str) -> None:
        self.name = model
        self.embedder = Embedder.from_pretrained(model).eval()
        self.embedder.backbone.cache_images(cache_folder() / "vision")
        self.cache = EmbeddingCache(default_cache(), describe(self.embedder, model))
        self._key_of = InputKeys()

    def prepare(self, items: Iterable[EmbeddingInput]) -> list[bytes]:
        """Encodes the inputs that the cache lacks, divided among the ranks; returns when all ranks have finished.

        The inputs may be made on demand: at most `HELD` of them are held at a time.

        Returns:
            The key of each input, in order.
        """
        keys: list[bytes] = []
        known: dict[bytes, bytes] = {}
        waiting: dict[bytes, EmbeddingInput] = {}
        with progress_bar(f"encoding with {self.name}", None) as advance:
            for item in items:
                key = self._key_of(item)
                if key not in known:
                    known[key], waiting[key] = key, item
                keys.append(known[key])  # equal keys are one object
                if len(waiting) == HELD:
                    self._encode(waiting, advance)
                    waiting = {}
            self._encode(waiting, advance)
        barrier()
        self.cache.refresh()
        return keys

    def _encode(self, items: dict[bytes, EmbeddingInput], progress: Callable[[int], None]) -> None:
        fill(self.cache, items, self.embedder.encode, share=(rank(), world_size()), progress=progress)
        if self.embedder.backbone.vision_cache is not None:
            self.embedder.backbone.vision_cache.flush()

    def rows(self, keys: Sequence[bytes]) -> Rows:
        """A view of the vectors of prepared inputs, in order; they are read from the cache's files on access."""
        return self.cache.rows(keys)

    def vectors(self, items: Sequence[EmbeddingInput]) -> torch.Tensor:
        """Returns unit-norm vectors in float32 on the CPU, [U, E]; encodes inputs that the cache lacks."""
        keys = [self._key_of(item) for item in items]
        fill(self.cache, dict(zip(keys, items, strict=True)), self.embedder.encode)
        return torch.from_numpy(np.array(self.cache.rows(keys)[:], dtype=np.float32))


def open_references(recipe: Recipe, sets: Mapping[str, Sequence[TrainExample]]) -> dict[str, ReferenceModel]:
    """Opens the models that the recipe's loss names, and encodes the sets that are in memory.

    Args:
        recipe: `loss.guide` and `loss.teacher`.
        sets: Examples by set name. Streamed sets are encoded batch by batch during training.

    Returns:
        The models by `FIELDS`.

    Raises:
        UserError: if a model cannot be loaded.
    """
    opened: dict[str, ReferenceModel] = {}
    named: dict[str, ReferenceModel] = {}
    for field in FIELDS:
        name = getattr(recipe.loss, field)
        if name is None:
            continue
        if name not in named:
            named[name] = ReferenceModel(name)
            whole = [examples for examples in sets.values() if not isinstance(examples, StreamedSet)]
            named[name].prepare(_inputs(whole))
        opened[field] = named[name]
    return opened


def _inputs(sets: Iterable[Sequence[TrainExample]]) -> Iterable[EmbeddingInput]:
    for examples in sets:
        for example in examples:
            yield from (example.query, *example.targets, *example.negatives)
