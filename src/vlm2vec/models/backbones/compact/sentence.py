"""`compact-sentence`: a built-in small VLM whose language model is a sentence encoder, for photographs.

image -> EfficientNet-Lite0 (frozen) -> a grid of cells, a token each
      -> projector: the words of the classes that the encoder sees, and a projection of the features ----+
      -> bypass: a sentence vector of the whole image, added to the final states of the visual tokens    |
text  ---------------------------------------------------------------------------------------------------+
      -> all layers of all-MiniLM-L6-v2, every token reads every token -> mean of the final states

The bypass makes a photograph's vector lie near the sentence vectors of its captions before any training on a task. This
project trained it (`pretraining.image_sentences`) and ships it.

Shapes: B examples, N images, L tokens, T visual tokens of an image, F features, C classes, D embedding dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import NUMBERED, MediaTokens
from vlm2vec.models.backbones.compact.parts import (
    FINAL_DIM,
    VISION_DIM,
    EfficientNetLite,
    load_sentence_encoder,
)
from vlm2vec.models.backbones.compact.processing import SentenceBackbone
from vlm2vec.models.backbones.compact.seen_classes import SeenClasses, class_words
from vlm2vec.models.backbones.compact.settings import checked_settings
from vlm2vec.models.backbones.decoder import DecoderBackbone
from vlm2vec.models.prompts import split_at_images
from vlm2vec.types import EmbeddingInput

SHIPPED = Path(__file__).with_name("sentence_bypass.safetensors")
SHIPPED_SHA256 = "060efed69ab18cdaa3c6ebf6fad205422a1372d59562e63b1dcc357b0346f761"
BYPASS_WIDTH = 768
PRIOR_SCALE = 2.5  # of the class sentences against the learned part of the bypass, as it was trained
BYPASS_SCALE = 16.0  # a bypass vector is then three times as long as a mean of MiniLM's states
DEFAULTS = {"num_layers": 6, "visual_tokens": 9, "image_size": 192}


def normalized(features: torch.Tensor) -> torch.Tensor:
    """Features [.., F] whose last feature map has mean 0 and variance 1; the other values are left as they are."""
    seen = F.layer_norm(features[..., :FINAL_DIM].float(), (FINAL_DIM,))
    return torch.cat([seen, features[..., FINAL_DIM:].float()], dim=-1)


class SentenceProjector(nn.Module):
    """Visual features [N, T, F] -> input vectors of the language model [N, T, D].

    A new projector gives the words of the classes alone.
    """

    def __init__(self, class_words: SeenClasses, num_tokens: int) -> None:
        super().__init__()
        self.class_words = class_words
        dim = class_words.vectors_CD.shape[1]
        self.layer = nn.Linear(VISION_DIM, dim)
        self.positions = nn.Parameter(torch.zeros(num_tokens, dim))
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """One input vector per visual token."""
        words: torch.Tensor = self.class_words(features)
        projected: torch.Tensor = self.layer(normalized(features).to(self.layer.weight.dtype))
        return words + projected + self.positions


class Bypass(nn.Module):
    """Visual features [N, T, F] -> sentence vectors of whole images [N, D].

    The mean over the tokens of the expected sentence vector of their class, plus what two trained layers read from the
    mean of the tokens, which is the whole image.
    """

    def __init__(self, class_sentences: SeenClasses, dropout: float = 0.0) -> None:
        super().__init__()
        self.class_sentences = class_sentences
        dim = class_sentences.vectors_CD.shape[1]
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(VISION_DIM, BYPASS_WIDTH),
            nn.GELU(),
            nn.Dropout(dropout),
            last := nn.Linear(BYPASS_WIDTH, dim),
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Unit vectors."""
        prior: torch.Tensor = self.class_sentences(features).mean(dim=-2)
        whole = normalized(features.float().mean(dim=-2))
        learned: torch.Tensor = self.layers(whole.to(next(self.layers.parameters()).dtype))
        return F.normalize(PRIOR_SCALE * prior + learned, dim=-1)


class SentenceModel(nn.Module):
    """Vision encoder, projector, bypass and sentence encoder.

    The image token id is one past the text vocabulary, so that no text can produce it.
    """

    language_model: Any
    config: Any

    def __init__(
        self, vision: EfficientNetLite, projector: SentenceProjector, bypass: Bypass, language_model: nn.Module
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.bypass = bypass
        self.language_model = language_model
        self.config = self.language_model.config  # PEFT reads it
        self.image_token_id = int(self.config.vocab_size)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Final states [B, L, D]; `image_features` [N, T, F] fill the image tokens."""
        is_image_BL1 = (input_ids == self.image_token_id).unsqueeze(-1)
        embeds_BLD = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image_BL1[..., 0], 0))
        added_BLD = torch.zeros_like(embeds_BLD)
        if image_features is not None and len(image_features):
            projected = self.projector(image_features).to(embeds_BLD.dtype)
            embeds_BLD = embeds_BLD.masked_scatter(is_image_BL1, projected)
            sentences_ND = BYPASS_SCALE * self.bypass(image_features)
            of_tokens = sentences_ND.unsqueeze(1).expand_as(projected).to(embeds_BLD.dtype)
            added_BLD = added_BLD.masked_scatter(is_image_BL1, of_tokens)
        output = self.language_model(inputs_embeds=embeds_BLD, attention_mask=attention_mask)
        states: torch.Tensor = output.last_hidden_state + added_BLD
        return states


class CompactSentence(SentenceBackbone, DecoderBackbone):
    """The VLM on a sentence encoder, and its processor. It pools by the mean and attends in both directions.

    Settings (`options` of `load`):
        num_layers: Layers of the sentence encoder, 1 to 6 (default 6: all of them).
        visual_tokens: Tokens per image, a square number such as 4, 9 or 16 (default 9).
        image_size: Side in pixels. Images are resized to a square of this side, ignoring their aspect ratio
            (default 192).
    """

    name: ClassVar[str] = "compact-sentence"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"compact-sentence": NUMBERED}
    trained_modules: ClassVar[list[str]] = ["projector", "bypass"]
    _pooling = "mean"
    _attention = "bidirectional"

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Self:
        """Assembles the model from its packaged parts; see the class for the settings."""
        settings = checked_settings(source, options, DEFAULTS)
        language, tokenizer = load_sentence_encoder(settings["num_layers"], dtype)
        vision = EfficientNetLite(settings["image_size"], settings["visual_tokens"], for_classifier=True)
        words_CD = class_words(language.get_input_embeddings().weight.detach(), tokenizer)
        projector = SentenceProjector(SeenClasses(vision.classifier, words_CD), vision.num_tokens)
        model = SentenceModel(vision, projector, shipped_bypass(vision), language).to(dtype)
        model.vision.float()  # pixel values are float32, and features must not depend on the dtype of the rest
        return cls(model, tokenizer, settings)

    @property
    def attention(self) -> str:
        """Always "bidirectional": a sentence encoder has no causal mask."""
        return self._attention

    @attention.setter
    def attention(self, name: str) -> None:
        if name != "bidirectional":
            raise UserError(f"attention {name}: {self.name} attends in both directions; remove the setting")

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, D] of the last layer, with the bypass at visual tokens."""
        hidden: torch.Tensor = self.model(batch["input_ids"], batch["attention_mask"], batch.get("image_features"))
        return hidden

    def _token_ids(self, item: EmbeddingInput) -> tuple[list[int], int]:
        """Text ids and the image ids of each image between MiniLM's first and last token.

        Raises:
            UserError: if there are too many images for the positions of MiniLM.
        """
        pieces = split_at_images(self.template.render(item))
        image = [self.config.vocab_size] * self.vision.num_tokens
        left = self.max_length - len(image) * sum(isinstance(piece, int) for piece in pieces)
        if left < 0:
            raise UserError(
                f"an input has {len(item.images)} images; {self.name} reads up to {self.max_length // len(image)}"
            )
        ids: list[int] = []
        dropped = 0
        for piece in pieces:
            if isinstance(piece, int):
                ids += image
                continue
            words, too_many = self._text_ids(piece, left)
            ids += words
            dropped += too_many
            left -= len(words)
        return self._enclosed(ids), dropped


def shipped_bypass(vision: EfficientNetLite) -> Bypass:
    """The bypass with its shipped weights and sentence vectors of the classes.

    Raises:
        UserError: if the file differs from the shipped one.
    """
    raw = SHIPPED.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHIPPED_SHA256:
        raise UserError(f"{SHIPPED}: SHA-256 differs from the shipped weights; reinstall vlm2vec")
    learned = {name: value.float() for name, value in load_safetensors(raw).items()}
    bypass = Bypass(SeenClasses(vision.classifier, learned.pop("class_sentences")))
    bypass.load_state_dict(learned)
    return bypass
