"""`compact`: the built-in small VLM, whose language model is a sentence encoder. Its parts need no model hub.

image -> EfficientNet-Lite0 (frozen) -> a grid of cells, a token each
      -> projector: the words of the classes that the encoder sees, and a projection of the features ----+
      -> bypass: sentence vectors of the image and of each cell; the text chooses among them what is     |
         added to the final states of the visual tokens                                                  |
text  ---------------------------------------------------------------------------------------------------+
      -> all layers of all-MiniLM-L6-v2, every token reads every token -> mean of the final states

The bypass makes a photograph's vector lie near the sentence vectors of its captions. This project pretrained it with
the projector, the choice and a low-rank change of the sentence encoder (`pretraining.teach_sentence`), and ships all.

Shapes: B examples, N images, L tokens, T visual tokens of an image, F features, C classes, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
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
from vlm2vec.models.backbones.compact.processing import CompactBackbone
from vlm2vec.models.backbones.compact.seen_classes import SeenClasses, input_vectors, names_of_classes
from vlm2vec.models.backbones.compact.settings import checked_settings
from vlm2vec.models.backbones.compact.weights import load_pretrained, shipped_weights
from vlm2vec.models.backbones.decoder import DecoderBackbone
from vlm2vec.models.prompts import split_at_images
from vlm2vec.types import EmbeddingInput

BYPASS_WIDTH = 768
PRIOR_SCALE = 2.5  # of the class sentences against the learned part of the bypass, as it was trained
BYPASS_SCALE = 16.0  # a bypass vector is then three times as long as a mean of MiniLM's states
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
DEFAULTS = {"num_layers": 6, "visual_tokens": 9, "image_size": 192}


def normalized(features: torch.Tensor) -> torch.Tensor:
    """Features [.., F] whose last feature map has mean 0 and variance 1; the other values are left as they are."""
    seen = F.layer_norm(features[..., :FINAL_DIM].float(), (FINAL_DIM,))
    return torch.cat([seen, features[..., FINAL_DIM:].float()], dim=-1)


class Projector(nn.Module):
    """Visual features [N, T, F] -> input vectors of the language model [N, T, D].

    A new projector gives the words of the classes and of the place of the token.

    Args:
        class_words: Input vectors of the classes.
        places_TD: An input vector for each place.
    """

    def __init__(self, class_words: SeenClasses, places_TD: torch.Tensor) -> None:
        super().__init__()
        self.class_words = class_words
        self.layer = nn.Linear(VISION_DIM, places_TD.shape[1])
        self.positions = nn.Parameter(places_TD.clone())
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


class CellChoice(nn.Module):
    """What the text of an input asks of an image: a mixture of the sentence vectors of the image and of its cells.

    The cells are weighted by an attention of the text to the visual tokens, whose states know their place and content;
    image and chosen cell are weighted by the text. A new module attends by similarity, and gives the image alone.

    Args:
        dim: Width of the language model.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, 2)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([1.0, 0.0]))

    def forward(
        self, text_ND: torch.Tensor, states_NTD: torch.Tensor, image_ND: torch.Tensor, cell_NTD: torch.Tensor
    ) -> torch.Tensor:
        """One vector per image, [N, D].

        Args:
            text_ND: Mean of the final states of the text around each image.
            states_NTD: Final states of the visual tokens.
            image_ND: Sentence vectors of the images.
            cell_NTD: Sentence vectors of their cells.
        """
        dim = text_ND.shape[-1:]
        text_ND = F.layer_norm(text_ND, dim)
        keys_NTD = self.key(F.layer_norm(states_NTD, dim))
        scores_NT = torch.einsum("nd,ntd->nt", self.query(text_ND), keys_NTD) / dim[0] ** 0.5
        chosen_ND = torch.einsum("nt,ntd->nd", scores_NT.softmax(dim=-1), cell_NTD.to(scores_NT.dtype))
        of_image_N1, of_cell_N1 = self.gate(text_ND).split(1, dim=-1)
        mixed_ND: torch.Tensor = of_image_N1 * image_ND + of_cell_N1 * chosen_ND
        return mixed_ND


class CompactModel(nn.Module):
    """Vision encoder, projector, bypass and sentence encoder.

    The image token id is one past the text vocabulary, so that no text can produce it.
    """

    language_model: Any
    config: Any

    def __init__(
        self, vision: EfficientNetLite, projector: Projector, bypass: Bypass, language_model: nn.Module
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.bypass = bypass
        self.language_model = language_model
        self.config = self.language_model.config  # PEFT reads it
        self.choice = CellChoice(int(self.config.hidden_size))
        self.image_token_id = int(self.config.vocab_size)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Final states [B, L, D]; `image_features` [N, T, F] fill the image tokens."""
        is_image_BL1 = (input_ids == self.image_token_id).unsqueeze(-1)
        embeds_BLD = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image_BL1[..., 0], 0))
        if image_features is not None and len(image_features):
            projected = self.projector(image_features).to(embeds_BLD.dtype)
            embeds_BLD = embeds_BLD.masked_scatter(is_image_BL1, projected)
        output = self.language_model(inputs_embeds=embeds_BLD, attention_mask=attention_mask)
        states_BLD: torch.Tensor = output.last_hidden_state
        if image_features is not None and len(image_features):
            is_text_BL1 = attention_mask.bool().unsqueeze(-1) & ~is_image_BL1
            added_NTD = self._bypassed(states_BLD, is_text_BL1, is_image_BL1, image_features)
            states_BLD = states_BLD + torch.zeros_like(states_BLD).masked_scatter(is_image_BL1, added_NTD)
        return states_BLD

    def _bypassed(
        self,
        states_BLD: torch.Tensor,
        is_text_BL1: torch.Tensor,
        is_image_BL1: torch.Tensor,
        image_features: torch.Tensor,
    ) -> torch.Tensor:
        """What the bypass adds to the states of the visual tokens, [N, T, D]."""
        num_tokens = image_features.shape[1]
        text_BD = (states_BLD * is_text_BL1).sum(dim=1) / is_text_BL1.sum(dim=1)
        images_B = is_image_BL1.sum(dim=(1, 2)) // num_tokens
        text_ND = text_BD.repeat_interleave(images_B, dim=0)
        states_NTD = states_BLD[is_image_BL1[..., 0]].view(-1, num_tokens, states_BLD.shape[-1])
        cell_NTD = self.bypass(image_features.unsqueeze(-2))
        added_ND: torch.Tensor = BYPASS_SCALE * self.choice(text_ND, states_NTD, self.bypass(image_features), cell_NTD)
        return added_ND.unsqueeze(1).expand_as(states_NTD).to(states_BLD.dtype)


class Compact(CompactBackbone, DecoderBackbone):
    """The built-in VLM and its processor. It pools by the mean and attends in both directions.

    Settings (`options` of `load`):
        num_layers: Layers of the sentence encoder, 1 to 6 (default 6: all of them).
        visual_tokens: Tokens per image, a square number such as 4, 9 or 16 (default 9).
        image_size: Side in pixels. Images are resized to a square of this side, ignoring their aspect ratio
            (default 192).
    """

    name: ClassVar[str] = "compact"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"compact": NUMBERED}
    trained_modules: ClassVar[list[str]] = ["bypass"]  # a few hundred steps undo what projector and choice have learned
    _pooling = "mean"
    _attention = "bidirectional"

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Self:
        """Assembles the model from its packaged parts; see the class for the settings."""
        settings = checked_settings(source, options, DEFAULTS)
        language, tokenizer = load_sentence_encoder(settings["num_layers"], dtype)
        vision = EfficientNetLite(settings["image_size"], settings["visual_tokens"])
        weights = shipped_weights()
        model = new_model(vision, language, tokenizer, weights.pop("class_sentences"))
        load_pretrained(model, weights)
        model = model.to(dtype)
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


def new_model(
    vision: EfficientNetLite, language: nn.Module, tokenizer: Any, class_sentences: torch.Tensor, dropout: float = 0.0
) -> CompactModel:
    """The model before its pretraining.

    Args:
        vision: The vision encoder.
        language: The sentence encoder.
        tokenizer: The sentence encoder's.
        class_sentences: Sentence vectors of the vision encoder's classes, [C, D].
        dropout: Of the bypass.
    """
    words_VD = language.get_input_embeddings().weight.detach()  # type: ignore[operator]
    classes = SeenClasses(vision.classifier, input_vectors(names_of_classes(), words_VD, tokenizer))
    projector = Projector(classes, input_vectors(names_of_places(vision.side), words_VD, tokenizer))
    return CompactModel(vision, projector, Bypass(SeenClasses(vision.classifier, class_sentences), dropout), language)


def names_of_places(side: int) -> list[str]:
    """What a person calls each cell of a square grid, in row-major order: "top left" to "bottom right"."""
    thirds = [(2 * place + 1) * 3 // (2 * side) for place in range(side)]
    return ["center" if row == column == 1 else f"{ROWS[row]} {COLUMNS[column]}" for row in thirds for column in thirds]
