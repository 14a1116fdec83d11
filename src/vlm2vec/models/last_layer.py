"""Computes the last layer at the last token only, for models with last-token pooling.

Within a layer, only attention mixes tokens. The query and output projections and the feed-forward block process each
token independently, and pooling reads the last token only, so in the last layer they need one token per row. Keys and
values still need all tokens. This saves about a quarter of the matrix products of a 4-layer model and a thirtieth of a
28-layer model. Vectors and gradients do not change.

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
    """The modules of a layer that process each token independently and consist of linear layers only.

    Feed-forward blocks with a router or experts are left out, and so are modules with names not in `BY_TOKEN`.
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
    """Context of a forward pass of which only the last token of each row is read.

    The modules compute that token and return zeros for all other tokens. They work as usual if they are called by
    keyword, from another thread, or with a number of rows or tokens that differs from the mask.

    Args:
        parts: Modules that process each token independently, see `by_token`.
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
    """Hooks that select the last tokens of a module's input and scatter its output into zeros."""

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
