"""Caches of frozen vision encoders' outputs by image content: each image is encoded once per job.

On disk, a cache is a folder of safetensors shards named after the encoder's fingerprint, so that features of other
weights, another input size or another pooling never mix. Shards are written to a temporary file and renamed, and
processes can share a folder.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef

T = TypeVar("T")
ENCODE_BATCH = 8  # activations of a convolutional encoder then fit the CPU's cache
SHARD_IMAGES = 2048
FLUSH_BYTES = 256 * 2**20


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of at most `size` items."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


class VisionCache:
    """Features by image content, in memory and optionally on disk.

    Args:
        encode: The frozen encoder: images -> features [N, T, C].
        fingerprint: Identifies weights, input size and pooling of the encoder.
        folder: Parent of the shards. None: features stay in memory for this job.
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
        """Features of these images in order, [N, T, C] float16. Missing ones are encoded and cached."""
        self._fill(images)
        return torch.stack([self._get(self._digest(image)) for image in images])

    def warm(
        self,
        images: Iterable[ImageRef],
        progress: Callable[[int], None] = lambda done: None,
        on_error: Callable[[ImageRef, UserError], None] | None = None,
    ) -> None:
        """Encodes every distinct image that is not cached yet, writing to disk on the way.

        Args:
            images: Images, repeats allowed.
            progress: Called with the number of images checked since the last call.
            on_error: Called with unreadable images. Without it, the first one raises.

        Raises:
            UserError: for an unreadable image, if `on_error` is None.
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
        """Writes features that are only in memory to a new shard and frees them. Without a folder it does nothing."""
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
            # Clones: a view would keep the whole batch in memory.
            self._memory.update({digest: row.clone() for (digest, _), row in zip(part, features, strict=True)})
            self.num_encoded += len(part)
            if len(self._memory) >= SHARD_IMAGES:
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
            raise UserError(f"{shard}: damaged cache of image features ({error}); delete this file") from error


class FeatureStore:
    """Outputs of a frozen vision encoder by the images of an example.

    Args:
        folder: Parent of the shards.
        fingerprint: Identifies the encoder's weights; each has a folder of its own.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._bytes = 0
        self._shard_of: dict[str, Path] = {}
        self._layout: dict[Path, dict[str, list[str]]] = {}
        self._open: dict[Path, Any] = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._register(shard)

    def get_rows(self, keys: Sequence[str]) -> Any:
        """The combined output for these examples; None if any of them is missing. The key "" means no images."""
        if any(key and key not in self._memory and key not in self._shard_of for key in keys):
            return None
        rows = [self._row(key) for key in keys if key]
        return join_rows(rows)

    def put_rows(self, keys: Sequence[str], output: Any, counts: dict[str, torch.Tensor]) -> None:
        """Stores each example's part of an output. Does nothing if the output cannot be split by example."""
        parts = split_output(output, counts, len(keys))
        if parts is None:
            return
        for key, part in zip(keys, parts, strict=True):
            if key and key not in self._memory and key not in self._shard_of:
                row = {name: tensor.detach().cpu().clone() for name, tensor in part.items()}
                self._memory[key] = row
                self._bytes += sum(tensor.nbytes for tensor in row.values())

    def flush_if_large(self) -> None:
        """Writes to disk if enough features are in memory."""
        if self._bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes features that are only in memory to a new shard and frees them."""
        if not self._memory:
            return
        name = uuid.uuid4().hex
        beside = self.folder / f"{name}.tmp"
        tensors = {f"{key}/{leaf}": tensor for key, row in self._memory.items() for leaf, tensor in row.items()}
        layout = {key: list(row) for key, row in self._memory.items()}
        save_file(tensors, beside, metadata={"layout": json.dumps(layout)})
        shard = self.folder / f"{name}.safetensors"
        beside.replace(shard)
        self._memory.clear()
        self._bytes = 0
        self._register(shard)

    def _row(self, key: str) -> dict[str, torch.Tensor]:
        if key in self._memory:
            return self._memory[key]
        shard = self._shard_of[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        return {leaf: self._open[shard].get_tensor(f"{key}/{leaf}") for leaf in self._layout[shard][key]}

    def _register(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                self._layout[shard] = json.loads((file.metadata() or {})["layout"])
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{shard}: damaged cache of image features ({error}); delete this file") from error
        self._shard_of.update(dict.fromkeys(self._layout[shard], shard))


class Features(dict[str, Any]):
    """A combined output with fields by key and by attribute, as models read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def split_output(output: Any, counts: dict[str, torch.Tensor], num_rows: int) -> list[dict[str, torch.Tensor]] | None:
    """Each example's part of a vision encoder's output, by path; None if it cannot be split by example.

    Args:
        output: A tensor, or fields that are tensors, lists of one tensor per image, or lists of such lists by level.
        counts: Rows of each packed input tensor that belong to each example, shape [B] each.
        num_rows: Number of examples, B.
    """
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(num_rows)]
    fields = output.items() if isinstance(output, dict) else [("", output)]
    for name, value in fields:
        if not _split_field(name, value, list(counts.values()), parts):
            return None
    return parts


def _split_field(path: str, value: Any, counts: list[torch.Tensor], parts: list[dict[str, torch.Tensor]]) -> bool:
    if value is None:
        return True
    if not isinstance(value, torch.Tensor | list | tuple):
        return False
    fitting = {tuple(c.tolist()) for c in counts if int(c.sum()) == len(value)}
    tensors = isinstance(value, torch.Tensor) or all(isinstance(item, torch.Tensor) for item in value)
    if tensors and len(fitting) == 1:
        start = 0
        for part, count in zip(parts, fitting.pop(), strict=True):
            if count and isinstance(value, torch.Tensor):
                part[f"{path}:"] = value[start : start + count]
            elif count:
                part.update({f"{path}#{j}": value[start + j] for j in range(count)})
            start += count
        return True
    if tensors:  # as many as images by two ways of counting, or by none
        return False
    return all(_split_field(f"{path}@{level}", item, counts, parts) for level, item in enumerate(value))


def join_rows(rows: list[dict[str, torch.Tensor]]) -> Any:
    """Combines parts of `split_output` for these examples."""
    fields: dict[str, Any] = {}
    for path in rows[0]:
        kind = ":" if path.endswith(":") else "#"
        place = path.rpartition(kind)[0]
        if place in fields:
            continue
        found = [tensor for row in rows for name, tensor in row.items() if name.rpartition(kind)[0] == place]
        fields[place] = torch.cat(found) if kind == ":" else found
    output = Features()
    for place, value in fields.items():
        name, _, level = place.partition("@")
        if level:
            output.setdefault(name, []).append(value)
        else:
            output[name] = value
    return output[""] if set(output) == {""} else output
