"""`compact-dual`: a baseline dual encoder in the style of CLIP, of the same pretrained parts as `compact`.

image -> EfficientNet-Lite0 (frozen) -> projector -> mean of the visual tokens -> head
text    -> first layers of SmolLM2 -> last token -> head

The vector of text and image is the sum of their unit vectors, as the MMEB paper scores its baselines.

Shapes: B examples, N images, T visual tokens, D embedding dim.
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
from vlm2vec.models.backbones.compact.processing import DualBackbone
from vlm2vec.models.last_layer import by_token, last_token_only
from vlm2vec.models.pooling import last_token
from vlm2vec.types import EmbeddingInput


class DualModel(nn.Module):
    """Two encoders with a head each, combined only in the sum."""

    def __init__(self, compact: CompactModel) -> None:
        super().__init__()
        self.vision = compact.vision
        self.language_model = compact.language_model
        self.config = compact.config
        dim = int(self.config.hidden_size)
        self.projector = compact.projector
        self.image_head = nn.Linear(dim, dim)
        self.text_head = compact.head

    def text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors of texts, [B, D]; zero for a row with the end token only."""
        output: Any = self.language_model(input_ids=input_ids, attention_mask=attention_mask)
        text_BD = F.normalize(self.text_head(last_token(output.last_hidden_state, attention_mask)), dim=-1)
        return text_BD * (attention_mask.sum(dim=1, keepdim=True) > 1)

    def image_features(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """Unit vectors of images from their visual tokens [N, T, 1480], [N, D]."""
        return F.normalize(
            self.image_head(self.projector(visual_tokens.to(self.image_head.weight.dtype)).mean(dim=1)), dim=-1
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_features: torch.Tensor | None,
        owner_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sum of an example's text and image vectors, [B, D]. `owner_N` is the example of each image."""
        text_BD = self.text_features(input_ids, attention_mask)
        if image_features is None or owner_N is None or not len(image_features):
            return text_BD
        return text_BD.index_add(0, owner_N, self.image_features(image_features).to(text_BD.dtype))


class CompactDual(DualBackbone):
    """The baseline and its processor. Settings as `Compact`; the visual tokens of an image are averaged."""

    name: ClassVar[str] = "compact-dual"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"compact-dual": NUMBERED}
    trained_modules: ClassVar[list[str]] = ["projector", "image_head", "text_head"]

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Self:
        """Assembles the two encoders. The heads are new and depend on torch's seed."""
        parts = Compact.load(source, dtype, **options)
        assert isinstance(parts.model, CompactModel)
        model = DualModel(parts.model).to(dtype)
        model.vision.float()  # features must not depend on the dtype of the rest, as in compact
        return cls(model, parts.tokenizer, parts.settings)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of an example's text and image vectors, [B, D]."""
        with last_token_only(self.last_parts(), batch["attention_mask"]):
            return super().forward(batch)

    def last_parts(self) -> list[nn.Module]:
        """Modules of the last layer that work on each token by itself, see `models/last_layer.py`."""
        layers: Any = self.language_model.layers
        return by_token(layers[-1])

    def _token_ids(self, item: EmbeddingInput) -> tuple[list[int], int]:
        """The words of the prompt without its images, and the end token."""
        ids, dropped = self._text_ids(self._words(item))
        return [*ids, self.tokenizer.eos_token_id], dropped
