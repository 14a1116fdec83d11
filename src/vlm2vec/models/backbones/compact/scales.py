"""The frozen vision encoder of `compact-sentence`: features of the whole image and of a grid of its parts.

Shapes: N images, T tokens, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.parts import (
    FINAL_DIM,
    PIXELS_SIDE,
    VISION_SHA256,
    feature_maps,
    load_efficientnet,
    to_pixels,
)

STAGE_DIMS = (120, 48)  # outputs of the stages at strides 16 and 8, which still have color and shape
LOW_DIM = sum(STAGE_DIMS) + 3 * PIXELS_SIDE**2
SCALES_DIM = FINAL_DIM + LOW_DIM


class SeveralScales(nn.Module):
    """Frozen EfficientNet-Lite2. The first token is the whole image, the others are the cells of a square grid.

    A token has the mean of the last feature map over its area (1,280 values, which the network's classifier reads),
    the means of two earlier stages, and the mean colors of 4 x 4 parts of the area.

    Args:
        image_size: Side in pixels to which images are resized, ignoring their aspect ratio.
        grid: Cells per side of the grid.
    """

    def __init__(self, image_size: int, grid: int) -> None:
        super().__init__()
        self.image_size, self.grid = image_size, grid
        self.network = load_efficientnet("lite2")
        self.requires_grad_(False)
        self.eval()

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return 1 + self.grid**2

    @property
    def classifier(self) -> nn.Linear:
        """The layer of the 1,000 ImageNet classes."""
        layer: nn.Linear = self.network._fc
        return layer

    def fingerprint(self) -> str:
        """Changes whenever the features of an image would change."""
        weights = VISION_SHA256["lite2"][:12]
        return f"efficientnet-lite2-{weights}-{self.image_size}px-1+{self.grid**2}tokens-{SCALES_DIM}"

    def forward(self, images: Sequence[ImageRef]) -> torch.Tensor:
        """Images -> features [N, T, F]. The cells are in row-major order from the top left."""
        pixels_NCHW = to_pixels(images, self.image_size, next(self.network.parameters()).device)
        maps = feature_maps(self.network, pixels_NCHW, STAGE_DIMS)
        return torch.cat([self._tokens(maps, pixels_NCHW, 1), self._tokens(maps, pixels_NCHW, self.grid)], dim=1)

    def train(self, mode: bool = True) -> SeveralScales:
        """Stays in evaluation mode, because it is frozen."""
        return super().train(False)

    @staticmethod
    def _tokens(maps: Sequence[torch.Tensor], pixels_NCHW: torch.Tensor, side: int) -> torch.Tensor:
        means = [F.adaptive_avg_pool2d(map_NCHW, side) for map_NCHW in maps]
        colors = F.pixel_unshuffle(F.adaptive_avg_pool2d(pixels_NCHW, side * PIXELS_SIDE), PIXELS_SIDE)
        return torch.cat([*means, colors], dim=1).flatten(2).transpose(1, 2)
