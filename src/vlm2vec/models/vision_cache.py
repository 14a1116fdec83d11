"""Outputs of a frozen vision encoder, kept by picture content: a picture passes through the encoder once a job.

On disk, a cache is a folder of safetensors shards named after the encoder's fingerprint, so features of other
weights, another input size or another pooling are never mixed up. Shards are written beside and renamed; two
processes may share a folder.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm2vec.errors import UserError
from vlm2vec.images import ImageRef

T = TypeVar("T")
ENCODE_BATCH = 8  # activations of a convolutional encoder then stay in the processor's cache
SHARD_PICTURES = 2048


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of at most `size` items."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


class VisionCache:
    """Features by picture content, in memory and, where a folder is given, on disk.

    Args:
        encode: The frozen encoder: pictures -> features [N, T, C].
        fingerprint: Identifies weights, input size and pooling of that encoder.
        folder: Parent of the shards; None keeps the features of this job in memory only.
    """

    def __init__(
        self, encode: Callable[[Sequence[ImageRef]], torch.Tensor], fingerprint: str, folder: Path | None = None
    ) -> None:
        self.encode, self.fingerprint = encode, fingerprint
        self._folder = folder / fingerprint if folder else None
        self._digests: dict[ImageRef, str] = {}
        self._memory: dict[str, torch.Tensor] = {}
        self._shard_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.num_encoded = 0
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            for shard in sorted(self._folder.glob("*.safetensors")):
                self._register(shard)

    def features(self, images: Sequence[ImageRef]) -> torch.Tensor:
        """Features of these pictures in order, [N, T, C] float16; what is missing is encoded and kept."""
        self._fill(images)
        return torch.stack([self._get(self._digest(image)) for image in images])

    def warm(
        self,
        images: Iterable[ImageRef],
        progress: Callable[[int], None] = lambda done: None,
        on_error: Callable[[ImageRef, UserError], None] | None = None,
    ) -> None:
        """Encodes every distinct picture that is not there yet, flushing to disk as it goes.

        Args:
            images: Pictures, repeats allowed.
            progress: Called with how many pictures were looked at since the last call.
            on_error: Receives unreadable pictures; without it the first one raises.

        Raises:
            UserError: for an unreadable picture, where `on_error` is None.
        """
        for part in chunks(dict.fromkeys(images), ENCODE_BATCH):
            try:
                self._fill(part)
            except UserError:
                if on_error is None:
                    raise
                self._fill_readable(part, on_error)
            progress(len(part))
        self.flush()

    def flush(self) -> None:
        """Writes what is only in memory to a new shard and frees it; does nothing without a folder."""
        if self._folder is None or not self._memory:
            return
        name = uuid.uuid4().hex
        beside = self._folder / f"{name}.tmp"
        save_file({digest: features.contiguous() for digest, features in self._memory.items()}, beside)
        shard = self._folder / f"{name}.safetensors"
        beside.replace(shard)
        self._memory.clear()
        self._register(shard)

    def __contains__(self, digest: str) -> bool:
        return digest in self._memory or digest in self._shard_of

    def _fill(self, images: Sequence[ImageRef]) -> None:
        missing = {self._digest(image): image for image in images if self._digest(image) not in self}
        for part in chunks(missing.items(), ENCODE_BATCH):
            with torch.inference_mode():
                features = self.encode([image for _, image in part]).to(torch.float16).cpu()
            # A clone each: a view would keep the whole batch alive.
            self._memory.update({digest: row.clone() for (digest, _), row in zip(part, features, strict=True)})
            self.num_encoded += len(part)
            if len(self._memory) >= SHARD_PICTURES:
                self.flush()

    def _fill_readable(self, images: Sequence[ImageRef], on_error: Callable[[ImageRef, UserError], None]) -> None:
        for image in images:
            try:
                self._fill([image])
            except UserError as error:
                on_error(image, error)

    def _digest(self, image: ImageRef) -> str:
        if image not in self._digests:
            self._digests[image] = image.digest()
        return self._digests[image]

    def _get(self, digest: str) -> torch.Tensor:
        if digest in self._memory:
            return self._memory[digest]
        shard = self._shard_of[digest]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        features: torch.Tensor = self._open[shard].get_tensor(digest)
        return features

    def _register(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                self._shard_of.update(dict.fromkeys(file.keys(), shard))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard}: damaged cache of picture features ({error}); delete this file") from error
