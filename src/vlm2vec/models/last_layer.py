"""Computes the last layer at the last token only, if the vector is read there.

In a layer only the attention mixes tokens. Its other parts (the products before and after, the feed-forward part)
work on each token by itself. After the last attention no other token's state is read, so queries, output product and
feed-forward part of the last layer need one token per row: everything but keys, values and their attention. That
saves about a quarter of the matrix products of a 4-layer model and a thirtieth of a 28-layer one. The gradient is the
same.

Shapes: B examples, L tokens, D any width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlm2vec.models.pooling import last_places

BY_TOKEN = ("mlp", "self_attn.q_proj", "self_attn.o_proj")


def by_token(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that work on each token by itself and consist of linear layers only.

    A feed-forward part with a router or experts is left out, and so is a module of another name.
    """
    if getattr(layer, "gradient_checkpointing", False):  # activations are recomputed later, outside the context
        return []
    named = dict(layer.named_modules())
    return [named[path] for path in BY_TOKEN if path in named and _only_linear(named[path])]


def _only_linear(part: nn.Module) -> bool:
    """Whether every parameter of the module belongs to a linear layer."""
    return all(isinstance(m, nn.Linear) for m in part.modules() if any(True for _ in m.parameters(recurse=False)))


@contextmanager
def last_token_only(parts: Sequence[nn.Module], mask_BL: torch.Tensor) -> Iterator[None]:
    """Context of a forward pass whose result is read at each row's last token only.

    A module that is called by keyword, or with another number of rows or tokens than the mask has, works as usual.
    So do calls from other threads. For all other tokens the modules return zeros.

    Args:
        parts: Modules that work on each token by itself.
        mask_BL: 1 for tokens, 0 for padding.
    """
    if not parts or torch.compiler.is_compiling():  # a graph must not fix the positions
        yield
        return
    places = _Places(mask_BL)
    handles = [
        handle
        for part in parts
        for handle in (part.register_forward_pre_hook(places.gather), part.register_forward_hook(places.scatter))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Places:
    """Selects the last tokens of a module's input, and puts its output back among zeros."""

    def __init__(self, mask_BL: torch.Tensor) -> None:
        self.shape = mask_BL.shape
        self.rows_B = torch.arange(len(mask_BL), device=mask_BL.device)
        self.last_B = last_places(mask_BL)
        self.thread = threading.get_ident()
        self.inside: set[int] = set()

    def gather(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != self.thread or not args or args[0].shape[:2] != self.shape:
            return None
        self.inside.add(id(part))
        return (args[0][self.rows_B, self.last_B].unsqueeze(1), *args[1:])

    def scatter(self, part: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != self.thread or id(part) not in self.inside:
            return None
        self.inside.remove(id(part))
        whole_BLD = output.new_zeros(*self.shape, output.shape[-1])
        whole_BLD[self.rows_B, self.last_B] = output[:, 0]
        return whole_BLD
