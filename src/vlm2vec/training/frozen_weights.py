"""Casts frozen weights once per run instead of at every use.

Autocast casts float32 weights before each bfloat16 product. It caches the cast of trained weights for the rest of a
forward pass, but casts frozen weights (almost all weights with LoRA) again at every use. `FrozenCopies` casts them once
and substitutes the copies during a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class FrozenCopies:
    """Low-precision copies of the frozen float32 weights of linear layers: 50 % more memory, identical results.

    Args:
        model: The model with its adapters; a parameter is frozen if it requires no gradient.
        dtype: The autocast dtype; with float32, this class does nothing.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        linear = [module for module in model.modules() if type(module) is nn.Linear]
        ids = {id(module) for module in linear}
        # A weight shared with an embedding layer must stay float32 for that layer.
        elsewhere = {id(p) for m in model.modules() if id(m) not in ids for p in m.parameters(recurse=False)}
        found = {id(p): p for module in linear for p in module.parameters(recurse=False)}
        self.copies = [
            (p, p.detach().to(dtype))
            for p in found.values()
            if p.dtype is torch.float32 and p.dtype is not dtype and not p.requires_grad and id(p) not in elsewhere
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager for a step under autocast, including backward passes; restores the weights at exit."""
        originals = [parameter.data for parameter, _ in self.copies]
        try:
            for parameter, copy in self.copies:
                parameter.data = copy
            yield
        finally:
            for (parameter, _), original in zip(self.copies, originals, strict=True):
                parameter.data = original
