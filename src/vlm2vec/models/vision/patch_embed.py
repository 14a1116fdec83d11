"""Patch embeddings as matrix products.

A convolution whose stride equals its kernel reads every pixel once: it is a matrix product over patches. Some CPUs run
such convolutions many times slower than the product, 3-D convolutions most of all.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import nn


class _PatchProduct:
    """Mixin for a convolution: the same parameters and result, by a matrix product."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    kernel_size: tuple[int, ...]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, C, ...] -> [N, D, ...] as the convolution. Incomplete patches at the far edges are left out."""
        n, channels = pixels.shape[:2]
        grid = [size // kernel for size, kernel in zip(pixels.shape[2:], self.kernel_size, strict=True)]
        for axis, (patches, kernel) in enumerate(zip(grid, self.kernel_size, strict=True), start=2):
            pixels = pixels.narrow(axis, 0, patches * kernel)
        cut = pixels.reshape(n, channels, *chain.from_iterable(zip(grid, self.kernel_size, strict=True)))
        axes = len(grid)
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        patches_PK = cut.permute(order).reshape(n * math.prod(grid), -1)
        product = nn.functional.linear(patches_PK, self.weight.flatten(1), self.bias)
        return product.view(n, *grid, -1).movedim(-1, 1)


class PatchConv2d(_PatchProduct, nn.Conv2d):
    """`nn.Conv2d` whose stride equals its kernel."""


class PatchConv3d(_PatchProduct, nn.Conv3d):
    """`nn.Conv3d` whose stride equals its kernel."""


KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: PatchConv2d, nn.Conv3d: PatchConv3d}


def use_matrix_products(model: nn.Module) -> int:
    """Replaces every such convolution of a model by a matrix product, in place. Names and weights stay.

    Returns:
        Number of replaced convolutions.
    """
    changed = 0
    for module in model.modules():
        if type(module) in KINDS and _is_patch_embedding(module):
            module.__class__ = KINDS[type(module)]
            changed += 1
    return changed


def _is_patch_embedding(conv: nn.Module) -> bool:
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding in ((0,) * len(conv.kernel_size), "valid")
    return plain and tuple(conv.stride) == tuple(conv.kernel_size) and math.prod(conv.kernel_size) > 1
