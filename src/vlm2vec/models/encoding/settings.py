"""What the encoding pipeline needs of a model, and its settings. Shapes: N inputs, D embedding dim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError, shown
from vlm2vec.models.backbones.base import Backbone


class EncodingModel(Protocol):
    """What the pipeline needs of a model. An `Embedder` implements it."""

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        ...

    @property
    def backbone(self) -> Backbone:
        """The network and its processor."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Length of a vector, D."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Enables or disables dropout."""
        ...

    def eval(self) -> Any:
        """Disables dropout."""
        ...

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Unit-norm vectors of a batch, [N, D]."""
        ...


@dataclass(frozen=True)
class EncodeSettings:
    """Arguments of `Embedder.encode`, which explains them.

    Raises:
        UserError: for a number below 1, and for what is no whole number.
    """

    instruction: str | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    truncate_dim: int | None = None
    workers: int | None = None
    on_error: Callable[[int, UserError], None] | None = None
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "truncate_dim", "workers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise UserError(f"{name}={shown(value)}: expected a whole number")
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: expected 1 or more")
