"""`phi3_v`: Phi-3-vision, Phi-3.5-vision and VLM2Vec checkpoints based on them, in their published layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import transformers
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import NUMBERED, MediaTokens
from vlm2vec.models.backbones.generic import Generic, first_line
from vlm2vec.models.backbones.phi3_v_parts import (
    IMAGE_TOKEN_ID,
    TILE,
    Phi3V,
    Phi3VConfig,
    normalize_tiles,
    num_tokens,
    tile,
)
from vlm2vec.models.checkpoints.tensors import check_weight_files
from vlm2vec.models.prompts import PLACEHOLDER
from vlm2vec.models.transformers_internals import image_processor_settings, tokenizer_config
from vlm2vec.models.vision.resolution import side_of
from vlm2vec.types import BARE_IMAGE_TOKEN, EmbeddingInput

DEFAULTS = {"num_crops": 1, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
IMAGE_WORDS = "<|image_1|>"
"""What the published prompts of this family hold for an image; without an image it is read as plain text."""


@dataclass
class Phi3VProcessor:
    """The tokenizer and the settings of `phi3_v_parts.tile`."""

    tokenizer: Any
    image_settings: dict[str, Any]
    image_token: ClassVar[str] = "<|image|>"  # noqa: S105

    def save_pretrained(self, folder: Path) -> None:
        """Writes the tokenizer, and the image settings in the layout of published folders."""
        self.tokenizer.save_pretrained(folder)
        about = {"image_processor_type": "Phi3VImageProcessor", **self.image_settings}
        (folder / "preprocessor_config.json").write_text(json.dumps(about, indent=2) + "\n")


class Phi3Vision(Generic):
    """The network of `phi3_v_parts` and its processor.

    Settings (`options` of `load`):
        num_crops: Maximum tiles per image. Default: that of the folder (4 in Phi-3.5-vision).
        resolution: "low", "mid" or "high": 1, 4 or 16 tiles of 336 pixels squared; or `max_pixels`.
        num_frames: Frames sampled from a video, each an image (default 8).
        padding_side: "right" (default) or "left".
    """

    name: ClassVar[str] = "phi3_v"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"phi3_v": NUMBERED}

    def __init__(self, model: nn.Module, processor: Phi3VProcessor, settings: dict[str, Any]) -> None:
        super().__init__(model, processor, settings)
        self._sends_bytes = False
        self.lora_targets = r"layers\..*\.(qkv_proj|o_proj|gate_up_proj|down_proj)"

    @classmethod
    def load(
        cls,
        source: str,
        dtype: torch.dtype,
        revision: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Loads a folder or hub id. Pickled weights only if allowed; code from there never. Settings: see the class."""
        num_crops = _num_crops(options)
        try:
            check_weight_files(source, allow_pickle)
            config = Phi3VConfig.from_pretrained(source, revision=revision)
            model, report = Phi3V.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                revision=revision,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise UserError(f"weight {min(report['missing_keys'])} is missing")
            saved = image_processor_settings(source, revision)
            images = {name: saved.get(name) or default for name, default in DEFAULTS.items()}
            images["num_crops"] = num_crops or images["num_crops"]
            return cls(model, Phi3VProcessor(_load_tokenizer(source, revision), images), options)
        except Exception as error:  # transformers and tokenizers raise many types, plain Exception among them
            raise UserError(f"{source}: cannot be loaded as a Phi-3 vision model: {first_line(error)}") from error

    @property
    def language_model(self) -> nn.Module:
        """The whole network: Phi-3's decoder, which contains the vision encoder next to its input embeddings."""
        return self.model

    def language_parts(self) -> list[nn.Module]:
        """Everything but the vision encoder and its projection."""
        model: Any = self.model
        return [model.embed_tokens, model.layers, model.norm]

    def send_bytes(self) -> bool:
        """As in the base class. The small copy of an image is made of its tiles, on the model's device."""
        self._sends_bytes = True
        return True

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """As in the base class."""
        pixels = batch.get("pixel_values")
        if pixels is not None and pixels.dtype is torch.uint8 and len(pixels):
            sizes = batch["image_sizes"].tolist()
            tiles = torch.split(pixels, [down * across for down, across in sizes])
            values = torch.cat([self._normalized(*image) for image in zip(tiles, sizes, strict=True)])
            batch = replace(batch, tensors={**batch.tensors, "pixel_values": values})
        return super().hidden_states(batch)

    def _example(self, item: EmbeddingInput) -> dict[str, torch.Tensor]:
        """Texts between images, empty ones included, are tokenized separately, each with the begin token."""
        ids: list[int] = []
        tiles, sizes = [], []
        for i, piece in enumerate(PLACEHOLDER.split(self.template.render(item))):
            if i % 2 == 0:
                words = piece if item.images else piece.replace(BARE_IMAGE_TOKEN, IMAGE_WORDS)
                ids += self.tokenizer(words)["input_ids"]
                continue
            pixels, size = self._tiles(item.images[int(piece) - 1])
            tiles.append(pixels)
            sizes.append(size)
            ids += [IMAGE_TOKEN_ID] * num_tokens(*size)
        if not ids:
            raise UserError("input has an empty text and no image; expected at least one of them")
        tensors = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return tensors | ({"pixel_values": torch.cat(tiles), "image_sizes": torch.tensor(sizes)} if tiles else {})

    def _tiles(self, image: Any) -> tuple[torch.Tensor, list[int]]:
        try:
            tiles, size = tile(image.load(), self.processor.image_settings["num_crops"])
        except ValueError as error:
            raise UserError(f"{image}: {error}") from error
        return (tiles if self._sends_bytes else self._normalized(tiles, size)), size

    def _normalized(self, tiles: torch.Tensor, size: list[int]) -> torch.Tensor:
        about = self.processor.image_settings
        return normalize_tiles(tiles, size, about["image_mean"], about["image_std"])


def _num_crops(options: dict[str, Any]) -> int | None:
    """Number of tiles that the settings ask for; None: the default of the folder.

    Raises:
        UserError: for an unknown setting or value.
    """
    side, num_crops = side_of(options), options.get("num_crops")
    counts = [value for value in (num_crops, options.get("num_frames")) if value is not None]
    known = {"num_crops", "padding_side", "resolution", "max_pixels", "num_frames"}
    good = options.get("padding_side", "right") in ("right", "left") and all(type(n) is int and n > 0 for n in counts)
    if set(options) - known or not good or (side is not None and num_crops is not None):
        raise UserError(
            f"settings {options}: expected num_crops (1 or more) or resolution or max_pixels, "
            "num_frames (1 or more) and padding_side (right or left)"
        )
    return num_crops if side is None else max(1, (side // TILE) ** 2)


def _load_tokenizer(source: str, revision: str | None) -> Any:
    """The tokenizer file as it is: today's Llama class would build another normalizer than the published one."""
    about = tokenizer_config(source, revision)
    is_llama = str(about.get("tokenizer_class", "")).startswith(
        "LlamaTokenizer"
    )  # which starts texts with a begin token
    starts = {"add_bos_token": about.get("add_bos_token", True)} if is_llama else {}
    return transformers.PreTrainedTokenizerFast.from_pretrained(source, revision=revision, **starts)
