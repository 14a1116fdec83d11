"""Frozen weights are cast once a run, not at every use.

Under autocast a product in bfloat16 of float32 weights casts them first. Those that are trained autocast keeps for the
rest of a forward pass; frozen ones, which with LoRA are nearly all, it casts again each time. The cast copy is the same
every time, so it is made once, and takes the weights' place while a step runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class FrozenCopies:
    """Copies of the frozen float32 weights of linear layers: half their memory again, and the same numbers.

    Args:
        model: Adapters in place; what is frozen is asked of each parameter.
        dtype: What autocast would cast to; float32: there is nothing to do.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        linear = [module for module in model.modules() if type(module) is nn.Linear]
        ids = {id(module) for module in linear}
        # A weight that an embedding shares is read in float32 there.
        elsewhere = {id(p) for m in model.modules() if id(m) not in ids for p in m.parameters(recurse=False)}
        found = {id(p): p for module in linear for p in module.parameters(recurse=False)}
        self.copies = [
            (p, p.detach().to(dtype))
            for p in found.values()
            if p.dtype is torch.float32 and p.dtype is not dtype and not p.requires_grad and id(p) not in elsewhere
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Around a step under autocast, its backward passes included; the weights are back afterwards."""
        originals = [parameter.data for parameter, _ in self.copies]
        try:
            for parameter, copy in self.copies:
                parameter.data = copy
            yield
        finally:
            for (parameter, _), original in zip(self.copies, originals, strict=True):
                parameter.data = original
