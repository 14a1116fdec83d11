"""Network and images of Phi-3-vision and Phi-3.5-vision, whose own code does not run with current transformers.

image -> tiles of 336 px and a small copy of the whole image -> CLIP ViT -> 2x2 patches merged, a separator after each
row -> projection -> Phi-3 decoder. Tiling as in InternLM-XComposer2-4KHD (arXiv 2404.06512). Modules have the names of
the published weights.

Shapes: B examples, L tokens, T tiles, H x W tiles of one image, C channels of the vision encoder, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlm2vec.models.transformers_internals import share_attention

TILE = 336
IMAGE_TOKEN_ID = -1  # outside the vocabulary, so that no text can produce it
CLIP_L_336 = {  # openai/clip-vit-large-patch14-336; the published checkpoints omit it
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": TILE,
    "patch_size": 14,
    "projection_dim": 768,
}


def tile(image: Image.Image, num_crops: int) -> tuple[torch.Tensor, list[int]]:
    """Cuts an image into tiles.

    The longer side becomes as many tiles as possible with at most `num_crops` tiles in all. The shorter side is padded
    with white, half on either side.

    Returns:
        Bytes [H * W, 3, 336, 336], and [H, W].

    Raises:
        ValueError: for an image so thin that its shorter side would have no pixels.
    """
    upright = image.width < image.height
    wide = image.transpose(Image.Transpose.TRANSPOSE) if upright else image
    ratio = wide.width / wide.height
    across = 1
    while (across + 1) * math.ceil((across + 1) / ratio) <= num_crops:
        across += 1
    width, height = across * TILE, int(across * TILE / ratio)
    if height == 0:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is too thin")
    padded = math.ceil(height / TILE) * TILE
    canvas = Image.new("RGB", (width, padded), (255, 255, 255))
    canvas.paste(wide.resize((width, height), Image.Resampling.BILINEAR), (0, (padded - height) // 2))
    canvas = canvas.transpose(Image.Transpose.TRANSPOSE) if upright else canvas
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
    down, across = canvas.height // TILE, canvas.width // TILE
    tiles = pixels.view(3, down, TILE, across, TILE).permute(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE)
    return tiles, [down, across]


def normalize_tiles(tiles: torch.Tensor, size: list[int], mean: list[float], std: list[float]) -> torch.Tensor:
    """Pixel values [1 + H * W, 3, 336, 336] of one image: a small copy of the whole image, then its tiles.

    Args:
        tiles: As from `tile`.
        size: [H, W].
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """
    down, across = size
    mean_C11, std_C11 = (torch.tensor(value, device=tiles.device)[:, None, None] for value in (mean, std))
    values = (tiles.float() / 255 - mean_C11) / std_C11
    image = values.view(down, across, 3, TILE, TILE).permute(2, 0, 3, 1, 4).reshape(1, 3, down * TILE, across * TILE)
    return torch.cat([nn.functional.interpolate(image, size=(TILE, TILE), mode="bicubic"), values])


def num_tokens(down: int, across: int) -> int:
    """Tokens of an image: 12 x 12 per tile, a separator per row, the same for the small copy, and one separator."""
    return down * 12 * (across * 12 + 1) + 1 + 12 * 13


class Phi3VConfig(Phi3Config):  # type: ignore[misc]
    """The configuration of Phi-3, with the vision settings of the published file as further attributes."""

    model_type: ClassVar[str] = "phi3_v"


class ImageEmbedding(nn.Module):
    """Tiles -> vectors in the language model's input space."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        about = config.img_processor
        vision = CLIPVisionConfig(**{**CLIP_L_336, **(getattr(config, "vision_config", None) or {})})
        share_attention(config, vision)
        self.img_processor = nn.ModuleDict({"vision_model": CLIPVisionModel(vision)})
        self.layer = int(about.get("layer_idx", -2))
        merged = 4 * int(about["image_dim_out"])
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """From the tiles of all images [T, 3, 336, 336] and their [H, W] to the vectors of all their tokens."""
        features = self._patches(pixel_values)
        parts, first = [], 0
        for down, across in image_sizes.tolist():
            end = first + 1 + down * across
            whole, tiles = features[first : first + 1], features[first + 1 : end]
            parts += [self._rows(tiles, down, across), self.glb_GN[0], self._rows(whole, 1, 1)]
            first = end
        vectors: torch.Tensor = self.img_projection(torch.cat(parts))
        return vectors

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """States [T, P, C] of the patches after the layer that the config names; the layers after it are not run."""
        vision: Any = self.img_processor["vision_model"]
        layers = vision.encoder.layers
        states = vision.pre_layrnorm(vision.embeddings(pixel_values))
        for layer in layers[: self.layer if self.layer >= 0 else len(layers) + 1 + self.layer]:
            states = layer(states, None)
        return states[:, 1:]  # type: ignore[no-any-return]  # no class token

    def _rows(self, tiles_TPC: torch.Tensor, down: int, across: int) -> torch.Tensor:
        """Merges 2x2 patches into one vector each, joins rows across tiles, and adds a separator after each row."""
        side = math.isqrt(tiles_TPC.shape[1])
        grid = tiles_TPC.view(down, across, side // 2, 2, side // 2, 2, -1)
        grid = grid.permute(0, 2, 1, 4, 3, 5, 6).reshape(down * side // 2, across * side // 2, -1)
        return torch.cat([grid, self.sub_GN[0].expand(len(grid), 1, -1)], dim=1).flatten(0, 1)


class Phi3V(Phi3Model):  # type: ignore[misc]
    """Phi-3 decoder with images. The rotary frequencies of each example depend on its own length."""

    config_class = Phi3VConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"lm_head\."]

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.vision_embed_tokens = ImageEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Final-norm states; the images' vectors fill the places of `IMAGE_TOKEN_ID` in order."""
        is_image_BL = input_ids == IMAGE_TOKEN_ID
        embeds_BLD = self.embed_tokens(input_ids.masked_fill(is_image_BL, 0))
        if pixel_values is not None:
            vectors = self.get_image_features(pixel_values, image_sizes)
            embeds_BLD = embeds_BLD.masked_scatter(is_image_BL.unsqueeze(-1), vectors.to(embeds_BLD.dtype))
        is_long_B = attention_mask.sum(dim=1) > self.config.original_max_position_embeddings
        states = torch.empty_like(embeds_BLD)
        for rows_B in (is_long_B, ~is_long_B):  # long examples have other frequencies
            if rows_B.any():
                states = self._decode(states, rows_B, embeds_BLD, attention_mask, kwargs)
        return BaseModelOutputWithPast(last_hidden_state=states)

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
        """Vectors of the image tokens [N, D]; a method of the network, so that a frozen encoder's can be reused."""
        vectors: torch.Tensor = self.vision_embed_tokens(pixel_values, image_sizes)
        return vectors

    def _decode(
        self,
        states_BLD: torch.Tensor,
        rows_B: torch.Tensor,
        embeds_BLD: torch.Tensor,
        mask_BL: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        mask = mask_BL[rows_B]
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)  # the same on either padding side
        inputs = {"inputs_embeds": embeds_BLD[rows_B], "attention_mask": mask, "position_ids": places}
        output = super().forward(**inputs, **kwargs).last_hidden_state
        return output if rows_B.all() else states_BLD.masked_scatter(rows_B[:, None, None], output)
