"""Keeps image features in memory by content: an image passes the vision encoder once, in whatever prompts it occurs.

A reranker reads each candidate with many queries, and each query with many candidates. `frozen_vision.py` keeps the
features of whole examples, which are pairs here and hardly ever repeat.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vlm2vec.models.vision.frozen_vision import METHOD, PIXELS, add_tensor, owner_of, slim
from vlm2vec.models.vision.vision_cache import Features, join_rows, split_output

MAX_BYTES = 2 << 30  # about 2,600 images of 256 tokens of width 1,536 in bfloat16
BY_IMAGE = (PIXELS, "image_grid_thw", "image_sizes")
"""Inputs of the method whose rows belong to one image each, or to as many patches as its grid has."""
Parts = dict[str, torch.Tensor]


class FeatureMemory:
    """Wraps a model's method for image features where no gradient is needed, and keeps what it returns by image.

    Families whose features cannot be told apart by image (LLaVA-OneVision, Idefics3, SmolVLM) are computed as usual.
    The weights of the vision encoder must not change afterwards.

    Args:
        model: A network with a module that has `get_image_features`.
        max_bytes: Memory for features, on the CPU. The least recently used ones are dropped.

    Attributes:
        num_encoded: Number of images that passed the vision encoder.
    """

    def __init__(self, model: nn.Module, max_bytes: int = MAX_BYTES) -> None:
        self.num_encoded = 0
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[str, Parts] = OrderedDict()
        self._lock = threading.Lock()
        owner = owner_of(model)
        self._original: Callable[..., Any] = getattr(owner, METHOD)
        self._names = list(inspect.signature(self._original).parameters)
        object.__setattr__(owner, METHOD, self._features)

    def forget(self) -> None:
        """Drops all features."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _features(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        counts = None if torch.is_grad_enabled() else rows_by_image(tensors)
        if counts is None:
            return self._original(*args, **kwargs)
        with self._lock:
            parts = self._parts(given, tensors, counts)
        if parts is None:
            return self._original(*args, **kwargs)
        return _moved(join_rows(parts), tensors[PIXELS].device)

    def _parts(self, given: dict[str, Any], tensors: Parts, counts: Mapping[str, list[int]]) -> list[Parts] | None:
        """The features of each image; None if the output cannot be split by image."""
        images = _split(tensors, counts)
        keys = [_key(image) for image in images]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: place for place, key in reversed(list(enumerate(keys))) if key not in found}
        if missing:
            new = [images[place] for place in missing.values()]
            output = slim(
                self._original(**given | {name: torch.cat([image[name] for image in new]) for name in counts})
            )
            self.num_encoded += len(new)
            rows = {name: torch.tensor([len(image[name]) for image in new]) for name in counts}
            split = split_output(output, rows, len(new))
            if split is None:
                return None
            found |= {
                key: {path: tensor.detach().cpu().clone() for path, tensor in part.items()}
                for key, part in zip(missing, split, strict=True)
            }
        self._keep(found)
        return [found[key] for key in keys]

    def _keep(self, found: Mapping[str, Parts]) -> None:
        for key, parts in found.items():
            if key not in self._kept:
                self._bytes += _size(parts)
            self._kept[key] = parts
            self._kept.move_to_end(key)
        while self._bytes > self._max_bytes:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


def rows_by_image(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]] | None:
    """The rows of each packed tensor that belong to each image, or to each tile of one; None if that is not known."""
    if PIXELS not in tensors or not set(tensors) <= set(BY_IMAGE):
        return None
    grid = tensors.get("image_grid_thw")
    patches = [] if grid is None else grid.prod(dim=1).tolist()
    num = len(tensors[PIXELS]) if grid is None else len(grid)
    counts = {}
    for name, tensor in tensors.items():
        counts[name] = patches if name == PIXELS and grid is not None else [1] * num
        if sum(counts[name]) != len(tensor):
            return None
    return counts


def _split(tensors: Parts, counts: Mapping[str, list[int]]) -> list[Parts]:
    by_name = {name: torch.split(tensors[name], rows) for name, rows in counts.items()}
    return [dict(zip(by_name, parts, strict=True)) for parts in zip(*by_name.values(), strict=True)]


def _key(image: Parts) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(image.items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def _size(parts: Parts) -> int:
    return sum(tensor.nbytes for tensor in parts.values())


def _moved(output: Any, device: torch.device) -> Any:
    if isinstance(output, torch.Tensor):
        return output.to(device)
    if isinstance(output, dict):
        return Features({name: _moved(value, device) for name, value in output.items()})
    return [_moved(value, device) for value in output]
