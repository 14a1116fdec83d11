"""`compact-dual`: a baseline dual encoder in the style of CLIP, of the parts of `compact`.

image -> EfficientNet-Lite0 (frozen) -> bypass of `compact`: the sentence vector of the whole image
text    -> all-MiniLM-L6-v2 -> mean of the final states

The vector of text and image is the sum of their unit vectors, as the MMEB paper scores its baselines.

Shapes: B examples, N images, T visual tokens, F features, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.models.backbones.base import NUMBERED, MediaTokens
from vlm2vec.models.backbones.compact.model import Compact, CompactModel
from vlm2vec.models.backbones.compact.processing import CompactBackbone
from vlm2vec.models.pooling import mean
from vlm2vec.models.prompts import split_at_images
from vlm2vec.types import EmbeddingInput

NO_WORDS = 2  # tokens of an empty text: the first and the last token of MiniLM


class DualModel(nn.Module):
    """Two encoders, combined only in the sum."""

    def __init__(self, compact: CompactModel) -> None:
        super().__init__()
        self.vision = compact.vision
        self.language_model = compact.language_model
        self.config = compact.config
        self.bypass = compact.bypass

    def text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors of texts, [B, D]; zero for a row without words."""
        output: Any = self.language_model(input_ids=input_ids, attention_mask=attention_mask)
        text_BD = F.normalize(mean(output.last_hidden_state, attention_mask), dim=-1)
        return text_BD * (attention_mask.sum(dim=1, keepdim=True) > NO_WORDS)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_features: torch.Tensor | None,
        owner_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sum of an example's text and image vectors, [B, D].

        Args:
            input_ids: Token ids of the texts.
            attention_mask: 1 for tokens, 0 for padding.
            image_features: Features of the visual tokens of all images, [N, T, F].
            owner_N: The example of each image.
        """
        text_BD = self.text_features(input_ids, attention_mask)
        if image_features is None or owner_N is None or not len(image_features):
            return text_BD
        return text_BD.index_add(0, owner_N, self.bypass(image_features).to(text_BD.dtype))


class CompactDual(CompactBackbone):
    """The baseline and its processor, which encodes text and images apart. Settings as `Compact`."""

    name: ClassVar[str] = "compact-dual"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"compact-dual": NUMBERED}
    trained_modules: ClassVar[list[str]] = ["bypass"]

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Self:
        """Assembles the two encoders."""
        parts = Compact.load(source, dtype, **options)
        assert isinstance(parts.model, CompactModel)
        model = DualModel(parts.model).to(dtype)
        model.vision.float()  # features must not depend on the dtype of the rest, as in compact
        return cls(model, parts.tokenizer, parts.settings)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of an example's text and image vectors, [B, D]."""
        features = batch.get("image_features")
        owner_N = None
        if features is not None:
            counts_B = batch.rows["image_features"].to(features.device)
            owner_N = torch.repeat_interleave(torch.arange(len(counts_B), device=features.device), counts_B)
        vectors: torch.Tensor = self.model(batch["input_ids"], batch["attention_mask"], features, owner_N)
        return vectors

    def costs(self, batch: Batch) -> list[int]:
        """Tokens of the text and visual tokens of the images."""
        counts = batch.rows.get("image_features", torch.zeros(len(batch), dtype=torch.long)).tolist()
        visual = self.settings["visual_tokens"]
        return [tokens + visual * count for tokens, count in zip(batch.lengths(), counts, strict=True)]

    def _token_ids(self, item: EmbeddingInput) -> tuple[list[int], int]:
        """The words of the prompt without its images."""
        ids, dropped = self._text_ids(self._words(item), self.max_length)
        return self._enclosed(ids), dropped

    def _words(self, item: EmbeddingInput) -> str:
        """The words of the prompt without its images."""
        pieces = split_at_images(self.template.render(item))
        return " ".join(piece.strip() for piece in pieces if isinstance(piece, str)).strip()
