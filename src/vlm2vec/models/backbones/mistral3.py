"""`mistral3`: Mistral Small 3.1 and later. Its processor in transformers requires torchvision; this one does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import transformers

from vlm2vec.models.backbones.base import MediaTokens
from vlm2vec.models.backbones.generic import Generic
from vlm2vec.models.backbones.hf_processor import load_image_processor
from vlm2vec.models.transformers_internals import processor_settings

NAMES = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


@dataclass
class RowsOfPatches:
    """Writes an image as rows of image tokens, a break token between rows and an end token after the last.

    Attributes:
        tokenizer: Tokenizer of the folder.
        image_processor: Pixtral's PIL processor.
        about: Content of `processor_config.json`.
    """

    tokenizer: Any
    image_processor: Any
    about: dict[str, Any]

    @property
    def image_token(self) -> str:
        """The image token of prompts."""
        return str(self.about["image_token"])

    def __call__(
        self,
        text: list[str],
        images: list[list[Any]] | None,
        return_tensors: str,
        images_kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Tensors of one prompt and its images.

        Raises:
            ValueError: if prompt and images do not match.
        """
        pieces = text[0].split(self.image_token)
        images = images[0] if images else []
        if len(pieces) - 1 != len(images):
            raise ValueError(f"found {len(pieces) - 1} {self.image_token} in the text but {len(images)} images")
        pixels: Mapping[str, Any] = {}
        prompt = pieces[0]
        if images:
            side = int(self.about["patch_size"]) * int(self.about["spatial_merge_size"])
            pixels = self.image_processor(images, patch_size=side, return_tensors=return_tensors, **images_kwargs or {})
            for (height, width), piece in zip(pixels["image_sizes"].tolist(), pieces[1:], strict=True):
                prompt += self._rows(height // side, width // side) + piece
        return {**self.tokenizer([prompt], return_tensors=return_tensors, **more), **pixels}

    def save_pretrained(self, folder: Path) -> None:
        """Writes the files that transformers' own processor reads."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        about = {"processor_class": "PixtralProcessor", **self.about}
        (folder / "processor_config.json").write_text(json.dumps(about, indent=2) + "\n")

    def _rows(self, down: int, across: int) -> str:
        row = self.image_token * across + str(self.about["image_break_token"])
        return (row * down).removesuffix(str(self.about["image_break_token"])) + str(self.about["image_end_token"])


class Mistral3(Generic):
    """As `Generic`, with a processor that does not require torchvision."""

    name: ClassVar[str] = "mistral3"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"mistral3": (NAMES["image_token"], None)}

    @classmethod
    def load_processor(cls, source: str, common: dict[str, Any], options: dict[str, Any]) -> Any:
        """Tokenizer and image settings of the folder."""
        images = load_image_processor(source, common, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
        saved = processor_settings(source, common["revision"])
        usual = {**NAMES, "patch_size": 14, "spatial_merge_size": 2}
        return RowsOfPatches(tokenizer, images, {name: saved.get(name, value) for name, value in usual.items()})
