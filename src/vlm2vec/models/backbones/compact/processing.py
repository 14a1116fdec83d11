"""What `compact` and `compact-dual` share: settings, tokens, and the visual features of the frozen encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.prompts import order_of_images
from vlm2vec.models.vision.vision_cache import ENCODE_BATCH, VisionCache, chunks
from vlm2vec.types import EmbeddingInput

LANGUAGE_LINEARS = r".*\.encoder\..*\.(query|key|value|dense)"
MAX_TOKENS = 510  # the 512 positions of MiniLM without its first and its last token


class CompactBackbone(Backbone):
    """A backbone made of an EfficientNet-Lite and all-MiniLM-L6-v2, a BERT.

    Args:
        model: A network with `vision`, `language_model` and `config`.
        tokenizer: The language model's.
        settings: The options of `load`.
    """

    lora_targets = LANGUAGE_LINEARS
    generates = False  # a sentence encoder

    def __init__(self, model: nn.Module, tokenizer: Any, settings: dict[str, int]) -> None:
        super().__init__(model)
        self.vision: Any = model.vision  # kept here because PEFT may wrap the model later
        self.config: Any = model.config
        self._tokenizer = tokenizer
        self.settings = settings

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self._tokenizer

    @property
    def language_model(self) -> nn.Module:
        """The language model, with its input embeddings."""
        model: Any = self.model
        found: nn.Module = model.language_model
        return found

    def language_parts(self) -> list[nn.Module]:
        """The language model, which holds its input embeddings."""
        return [self.language_model]

    @property
    def embedding_dim(self) -> int:
        """The width of all-MiniLM-L6-v2: 384."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int:
        """510 tokens of text and images."""
        return MAX_TOKENS

    def options(self) -> dict[str, Any]:
        """The settings given to `load`."""
        return dict(self.settings)

    def collate(self, inputs: Sequence[EmbeddingInput]) -> Batch:
        """Token ids, padded on the right, and the packed visual features of all images."""
        numbered = [self._token_ids(item) for item in inputs]
        rows = [ids for ids, _ in numbered]
        length = max(map(len, rows))
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        orders = [order_of_images(self.template.render(item)) for item in inputs]
        images = [item.images[place] for item, order in zip(inputs, orders, strict=True) for place in order]
        dropped = tuple(count for _, count in numbered)
        batch = Batch({"input_ids": input_ids, "attention_mask": mask}, dropped=dropped if any(dropped) else ())
        if images:
            batch.tensors["image_features"] = self._features(images)
            batch.rows["image_features"] = torch.tensor(list(map(len, orders)))
        return batch

    def cache_images(self, folder: Path | None = None) -> bool:
        """Caches visual features by image content. The encoder is always frozen."""
        self.vision_cache = VisionCache(self.vision, self.vision.fingerprint(), folder)
        return True

    def save_processor(self, folder: Path) -> None:
        """Writes the tokenizer. The image settings are in `options`."""
        self.tokenizer.save_pretrained(folder)

    def _features(self, images: list[ImageRef]) -> torch.Tensor:
        if self.vision_cache is not None:
            return self.vision_cache.features(images)
        with torch.inference_mode():
            # float16, as cached features are: a vector must not depend on whether the cache is on.
            parts = [self.vision(part).to(torch.float16).cpu() for part in chunks(images, ENCODE_BATCH)]
        return torch.cat(parts)

    @abstractmethod
    def _token_ids(self, item: EmbeddingInput) -> tuple[list[int], int]:
        """Token ids of one input, the last one included, and the number of text tokens that were dropped."""

    def _text_ids(self, text: str, left: int) -> tuple[list[int], int]:
        """The first `left` tokens of a text, and the number of those dropped."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[:left], max(0, len(ids) - left)

    def _enclosed(self, ids: list[int]) -> list[int]:
        """Token ids between MiniLM's first and last token."""
        return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]
