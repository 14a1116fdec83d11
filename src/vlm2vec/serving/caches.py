"""Least recently used caches with a budget in bytes: vectors by input, image features by content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch

from vlm2vec.media.images import ImageRef
from vlm2vec.models.vision.vision_cache import VisionCache, chunks
from vlm2vec.serving.batching import Embedded

ENCODE_BATCH = 8
ENTRY_BYTES = 460  # of an entry beside its components: key, objects and map entry, as tracemalloc counts them
V = TypeVar("V")


class LRU(Generic[V]):
    """A thread-safe map that evicts the least recently used values.

    Args:
        max_bytes: Memory budget; 0: nothing is kept.
        size: Bytes of a value.
    """

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        self._max_bytes, self._size = max_bytes, size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = self.hits = self.misses = 0

    def get(self, key: Hashable) -> V | None:
        """Return the value and mark it as recently used, or return None."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.misses += 1
                return None
            self._values.move_to_end(key)
            self.hits += 1
            return value

    def put(self, key: Hashable, value: V) -> None:
        """Store a value, unless it exceeds the budget alone."""
        with self._lock:
            if key in self._values:
                self.num_bytes -= self._size(self._values.pop(key))
            if self._size(value) > self._max_bytes:
                return
            self._values[key] = value
            self.num_bytes += self._size(value)
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._size(self._values.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._values)


def result_cache(max_bytes: int) -> LRU[Embedded]:
    """A cache of results whose entries are counted at their real size: components, key, objects and map entry."""
    return LRU(max_bytes, lambda value: value.vector.nbytes + ENTRY_BYTES)


class ImageFeatures(VisionCache):
    """A thread-safe vision cache with a budget in bytes, for an unlimited number of images.

    Args:
        cache: The backbone's own cache; its encoder is used.
        max_bytes: Memory budget of the features.
    """

    def __init__(self, cache: VisionCache, max_bytes: int) -> None:
        super().__init__(cache.encode, cache.fingerprint)
        self.kept: LRU[torch.Tensor] = LRU(max_bytes, lambda features: features.nbytes + ENTRY_BYTES)

    def features(self, images: Sequence[ImageRef]) -> torch.Tensor:
        """Features of the images in order, [N, T, C] float16."""
        digests = [image.digest() for image in images]
        found = {digest: self.kept.get(digest) for digest in digests}
        missing = {digest: image for digest, image in zip(digests, images, strict=True) if found[digest] is None}
        for part in chunks(missing.items(), ENCODE_BATCH):
            with torch.inference_mode():
                features = self.encode([image for _, image in part]).to(torch.float16).cpu()
            for (digest, _), row in zip(part, features, strict=True):
                found[digest] = row.clone()  # a view would keep the memory of the whole batch
                self.kept.put(digest, row.clone())
        return torch.stack([found[digest] for digest in digests])  # type: ignore[misc]
