"""Encodes images once per step with a frozen vision encoder: the second forward pass reuses the first one's outputs.

GradCache encodes every mini-batch twice. If no parameter of vision encoder and projector is trained, the second pass
gives the same image features, so they are kept. Of V (vision) and L (language) forward passes, a step then costs
V + 2 L + backward instead of 2 V + 2 L + backward. On disk, features also serve later epochs.

Whether the encoder is frozen is read from the result, not from names: features that require no gradient depend on
frozen parameters only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.models.vision.raw_pixels import REAL
from vlm2vec.models.vision.vision_cache import FeatureStore

METHOD = "get_image_features"  # computes the vectors that replace image tokens, in models of transformers
PIXELS = "pixel_values"  # its input
UNUSED = ("last_hidden_state", "hidden_states", "attentions")  # fields of its output that are large and never read


class FrozenVision:
    """Wraps a model's method for image features and keeps its outputs if they require no gradient.

    Args:
        model: A network with a module that has `get_image_features`. PEFT may wrap it.
        store: Keeps features across steps and jobs. None: for the step only.

    Attributes:
        frozen: Whether the features require no gradient. None before the first images.
        num_runs: Number of times that the vision encoder encoded a mini-batch.
    """

    def __init__(self, model: nn.Module, store: FeatureStore | None = None) -> None:
        self.store = store
        self.frozen: bool | None = None
        self.num_runs = 0
        self._memo: dict[int, tuple[Any, list[torch.Tensor] | None]] = {}
        self._chunk: tuple[int, Batch] | None = None
        self._owner = owner_of(model)
        self._original: Callable[..., Any] = getattr(self._owner, METHOD)
        object.__setattr__(self._owner, METHOD, self._features)

    @staticmethod
    def possible(model: nn.Module) -> bool:
        """Whether the model has a method for image features that can be wrapped."""
        return any(hasattr(type(module), METHOD) for module in model.modules())

    def remove(self) -> None:
        """Restores the model's own method."""
        object.__delattr__(self._owner, METHOD)

    @contextmanager
    def serving(self, chunk: int, batch: Batch) -> Iterator[Batch]:
        """Context of a forward pass: features of this mini-batch are kept the first time and reused afterwards.

        It gives the mini-batch to encode. Where features are reused, its pixel values are one zero on the model's
        device, expanded to their shape: there is nothing to copy.
        """
        self._chunk = (chunk, batch)
        try:
            yield self._without_pixels(batch) if chunk in self._memo else batch
        finally:
            self._chunk = None

    def _without_pixels(self, batch: Batch) -> Batch:
        pixels = batch.get(PIXELS)
        if pixels is None:
            return batch
        like = next(self._owner.parameters())
        blank = torch.zeros((), dtype=like.dtype, device=like.device).expand(pixels.shape)
        tensors = {name: tensor for name, tensor in batch.tensors.items() if name != REAL}
        return dataclasses.replace(batch, tensors={**tensors, PIXELS: blank})

    def forget(self) -> None:
        """Drops the features of the step. Call it when the step is over."""
        self._memo.clear()
        if self.store is not None:
            self.store.flush_if_large()

    def _features(self, *args: Any, **kwargs: Any) -> Any:
        if self._chunk is None or self.frozen is False:
            return self._original(*args, **kwargs)
        number, batch = self._chunk
        if number not in self._memo:
            output, after = self._first_time(batch, args, kwargs)
            if not self.frozen:
                return output
            self._memo[number] = (output, after)
        output, after = self._memo[number]
        if after is not None:  # the encoder draws random numbers (dropout): later ones must not change
            self._set_random(after)
        return _copy(output)

    def _first_time(self, batch: Batch, args: Any, kwargs: Any) -> tuple[Any, list[torch.Tensor] | None]:
        keys = row_keys(batch) if self.store is not None else []
        if self.store is not None and (kept := self.store.get_rows(keys)) is not None:
            self.frozen = True
            return kept, None
        before = self._get_random()
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.frozen is None):
            output = self._original(*args, **kwargs)
        self.num_runs += 1
        if self.frozen is None:
            self.frozen = not any(leaf.requires_grad for leaf in leaves(output))
            if not self.frozen and not torch.is_grad_enabled():
                output = _map(output, torch.Tensor.detach)
        if self.frozen is False:
            return output, None
        output = slim(output)
        after = self._get_random()
        drew = any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        if self.store is not None and not drew:
            self.store.put_rows(keys, output, batch.rows)
        return output, after if drew else None

    @property
    def _device(self) -> torch.device:
        return next(self._owner.parameters()).device

    def _get_random(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def _set_random(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)


def owner_of(model: nn.Module) -> nn.Module:
    """The innermost module that has the method for image features."""
    return [module for module in model.modules() if hasattr(type(module), METHOD)][-1]


def row_keys(batch: Batch) -> list[str]:
    """A hash of each example's packed tensors, which identifies its images and videos; "" without any."""
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(len(batch))]
    some = [False] * len(batch)
    for name, counts in sorted(batch.rows.items()):
        start = 0
        for i, count in enumerate(counts.tolist()):
            if count:
                add_tensor(hashes[i], name, batch.tensors[name][start : start + count])
                some[i] = True
            start += count
    return [h.hexdigest() if is_some else "" for h, is_some in zip(hashes, some, strict=True)]


def add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Adds name, shape, data type and values of a tensor to a hash."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def vision_fingerprint(model: nn.Module, language_parts: Iterable[nn.Module], precision: str) -> str:
    """A hash of all weights outside the language model, which make the features, and of the precision they run in.

    Args:
        model: The network.
        language_parts: Its modules that are not hashed, see `Backbone.language_parts`.
        precision: Name of the data type that the features are computed in.

    Raises:
        ValueError: if no parameter is left to hash: the features of different weights would share one cache.
    """
    language = {id(parameter) for part in language_parts for parameter in part.parameters()}
    vision = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in language]
    if not vision:
        raise ValueError(f"{type(model).__name__}: no parameter outside the language model")
    digest = hashlib.blake2b(f"{type(model).__name__} {precision}".encode(), digest_size=16)
    for name, parameter in vision:
        add_tensor(digest, name, parameter)
    return digest.hexdigest()


def leaves(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a possibly nested output."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from leaves(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from leaves(value)


def _map(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, dict):
        return type(output)(**{name: _map(value, change) for name, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(_map(value, change) for value in output)
    return output


def _copy(output: Any) -> Any:
    """New containers around the same tensors: a model may modify the containers."""
    return _map(output, lambda tensor: tensor)


def slim(output: Any) -> Any:
    """The output without large fields that no model reads."""
    if not isinstance(output, dict):
        return output
    kept = {name: value for name, value in output.items() if name not in UNUSED or "pooler_output" not in output}
    return type(output)(**kept)
