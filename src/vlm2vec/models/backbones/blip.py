"""BLIP and BLIP-2: dual encoders whose text encoder can also attend to the image.

Shapes: B examples, N images, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.dual import DualEncoder


class Blip(DualEncoder):
    """BLIP's retrieval model (`BlipForImageTextRetrieval`).

    Settings: `fusion` may also be "feature", as in UniIR's BLIP_FF. The text encoder then attends to the image by cross
    attention, and its first state is the vector. A missing text is empty, a missing image all zeros.
    """

    name: ClassVar[str] = "blip"
    fusions: ClassVar[tuple[str, ...]] = ("sum", "unit", "feature")
    model_class: ClassVar[str] = "BlipForImageTextRetrieval"

    @property
    def embedding_dim(self) -> int:
        """Width of the contrastive projections; of the text encoder for feature fusion."""
        if self.fusion == "feature":
            return int(self.config.text_config.hidden_size)
        return int(self.config.image_text_hidden_size)

    @property
    def language_model(self) -> nn.Module:
        """The text encoder."""
        model: Any = self.model
        found: nn.Module = model.text_encoder
        return found

    def language_parts(self) -> list[nn.Module]:
        """The text encoder and the text projection."""
        model: Any = self.model
        return [model.text_encoder, model.text_proj]

    def forward(self, batch: Batch) -> torch.Tensor:
        """One vector per example, not normalized, [B, D]."""
        if self.fusion != "feature":
            return super().forward(batch)
        everything = torch.arange(len(batch), device=batch["input_ids"].device)
        return self.fused(self._text_tensors(batch, everything), self._one_image_each(batch)).float()

    def text_features(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Projected first states of the text encoder, [B, D]."""
        model: Any = self.model
        features: torch.Tensor = model.text_proj(model.text_encoder(**tensors).last_hidden_state[:, 0])
        return features

    def image_features(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Projected first states of the vision encoder, [N, D]."""
        model: Any = self.model
        features: torch.Tensor = model.vision_proj(model.vision_model(**tensors).last_hidden_state[:, 0])
        return features

    def fused(self, tensors: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
        """First states of the text encoder that attends to the images [B, C, H, W], [B, D]."""
        model: Any = self.model
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        all_seen = torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device)
        read = model.text_encoder(**tensors, encoder_hidden_states=seen, encoder_attention_mask=all_seen)
        first: torch.Tensor = read.last_hidden_state[:, 0]
        return first

    def write_sentence_transformers(self, folder: Path, prompts: Mapping[str, str]) -> None:
        """Writes this package's module: sentence-transformers loads another class of the family."""
        st_folder.write_own(folder, prompts)

    def _one_image_each(self, batch: Batch) -> torch.Tensor:
        """Pixel values [B, C, H, W]; zeros for an example without an image."""
        size = int(self.config.vision_config.image_size)
        parameter = next(self.model.parameters())
        pixels = torch.zeros(len(batch), 3, size, size, device=parameter.device, dtype=parameter.dtype)
        if given := self._image_tensors(batch):
            counts_B = batch.rows["pixel_values"]
            if int(counts_B.max()) > 1:
                raise UserError(f"{self.name}: fusion=feature reads one image per input, got {int(counts_B.max())}")
            pixels[counts_B.bool().to(pixels.device)] = given["pixel_values"]
        return pixels


class Blip2(Blip):
    """BLIP-2's retrieval model (`Blip2ForImageTextRetrieval`): first states of the Q-Former, as in the MMEB paper.

    With `fusion` "feature", the Q-Former reads text and image together.
    """

    name: ClassVar[str] = "blip-2"
    model_class: ClassVar[str] = "Blip2ForImageTextRetrieval"

    @property
    def language_model(self) -> nn.Module:
        """None: the Q-Former reads texts and images.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.name}: its Q-Former reads texts and images; it has no language model of its own")

    def language_parts(self) -> list[nn.Module]:
        """None, see `language_model`."""
        return [self.language_model]

    @property
    def embedding_dim(self) -> int:
        """Width of the Q-Former."""
        return int(self.config.qformer_config.hidden_size)

    def text_features(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The Q-Former's first state of each text, [B, D]."""
        model: Any = self.model
        embeds = model.embeddings(input_ids=tensors["input_ids"])
        read = model.qformer(query_embeds=embeds, query_length=0, attention_mask=tensors["attention_mask"])
        first: torch.Tensor = read.last_hidden_state[:, 0]
        return first

    def image_features(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The Q-Former's first query of each image, [N, D]."""
        model: Any = self.model
        seen, all_seen = self._seen(tensors["pixel_values"])
        queries = model.query_tokens.expand(len(seen), -1, -1)
        read = model.qformer(query_embeds=queries, encoder_hidden_states=seen, encoder_attention_mask=all_seen)
        first: torch.Tensor = read.last_hidden_state[:, 0]
        return first

    def fused(self, tensors: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
        """The Q-Former's first query of each text and image, read together, [B, D]."""
        model: Any = self.model
        seen, all_seen = self._seen(pixels)
        queries = model.query_tokens.expand(len(seen), -1, -1)
        mask = tensors["attention_mask"]
        read = model.qformer(
            query_embeds=model.embeddings(input_ids=tensors["input_ids"], query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([mask.new_ones(queries.shape[:-1]), mask], dim=1),
            encoder_hidden_states=seen,
            encoder_attention_mask=all_seen,
        )
        first: torch.Tensor = read.last_hidden_state[:, 0]
        return first

    def _seen(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model: Any = self.model
        seen = model.vision_model(pixel_values=pixels.to(model.vision_model.dtype)).last_hidden_state
        all_seen = torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device)
        return seen.to(model.query_tokens.dtype), all_seen
